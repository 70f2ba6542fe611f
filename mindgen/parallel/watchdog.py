"""Notices a rank that is dead, hung or has failed, and ends all others with one message that names it.

Every rank counts up a number in the store, and reads the others' numbers, twice a second. What is counted against a
silent peer is *rounds that this rank has made itself*: when all of them are stopped together (Ctrl-Z, a suspended
laptop) nobody is accused. The store answers from rank 0, or from torchrun's agent beside it; when it is silent, that
side is gone. A rank that leaves in good order says so first, and is missed by nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from mindgen.parallel.group import PeerLost
from mindgen.parallel.launch import Ranks, start_thread
from mindgen.parallel.process import Process
from mindgen.parallel.rendezvous import pulse_key

ROUND = 0.5  # seconds
UP, LOADING, GUEST, FAILED, LEFT = "up", "loading", "guest", "failed", "left"
# Rounds without a sign of life that are forgiven. Loading may hold Python's interpreter lock for long, and nobody knows
# for how long a program does that only has us as a guest.
FORGIVEN = {UP: 10, LOADING: 120, GUEST: 1200}
FAILURE_GRACE = 4  # rounds in which a rank that has met the same failure ends by itself, and says it better
LEAVING_TIMEOUT = 10.0
SPEECH_ROUNDS = 5  # in which the rank that speaks for all does so, before the silent ones end


@dataclass
class Peer:
    """What this rank knows of another one."""

    pulse: bytes = b""
    rounds: int = 0  # that I have made since the pulse changed
    state: str = UP
    text: str = ""  # why it failed

    def hear(self, pulse: bytes) -> None:
        self.rounds = self.rounds + 1 if pulse == self.pulse else 0
        if pulse and pulse != self.pulse:
            self.pulse = pulse
            self.state, _, self.text = pulse.decode().split("\n", 2)

    @property
    def is_silent(self) -> bool:
        return self.rounds >= FORGIVEN.get(self.state, self.rounds + 1)

    @property
    def has_failed(self) -> bool:
        return self.state == FAILED and self.rounds >= FAILURE_GRACE


class Watchdog:
    """Says that this rank lives, and watches the others from two threads of its own.

    A rank started by rank 0 watches rank 0 only; rank 0 looks after the rest. Elsewhere everybody watches everybody.
    `keys` is a store connection that nobody else uses, `processes` are all ranks' processes; a round takes `pause`
    seconds.
    """

    def __init__(self, ranks: Ranks, keys: dist.Store, processes: Sequence[Process], pause: float = ROUND) -> None:
        assert ranks.meeting is not None, "one rank alone has nobody to watch"
        self._ranks, self._meeting, self._keys, self._processes = ranks, ranks.meeting, keys, processes
        place = ranks.place
        watched = (0,) if self._meeting.own_ranks and place.rank > 0 else range(place.world_size)
        self._peers = {rank: Peer() for rank in watched if rank != place.rank}
        self._usual = GUEST if ranks.is_guest else UP
        self._state, self._text = self._usual, ""
        self._rounds, self._pause = 0, pause
        self._saying = threading.Lock()
        self._stopped = threading.Event()

    def start(self) -> None:
        for work in (self._watch_peers, self._watch_store):
            start_thread(work, work.__name__)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While the block runs, the others forgive this rank a minute of silence instead of five seconds."""
        self._say(LOADING)
        try:
            yield
        finally:
            self._say(self._usual)

    def leave(self, timeout: float = LEAVING_TIMEOUT) -> None:
        """An orderly end: tells the others, and waits until they leave too, at most `timeout` seconds.

        Rank 0 takes the store with it, hence the wait.
        """
        self._say(LEFT)
        names = [f"left/{rank}" for rank in range(self._ranks.place.world_size)]
        deadline = time.monotonic() + timeout
        with suppress(RuntimeError):  # the store may be gone by now
            self._keys.set(names[self._ranks.place.rank], "")
            while not self._keys.check(names) and time.monotonic() < deadline:
                time.sleep(0.02)
        self._stopped.set()

    def fail(self, reason: str) -> None:
        """Tells the others that this rank cannot go on, and why."""
        self._say(FAILED, reason)
        self._stopped.set()

    def explain(self, message: str) -> NoReturn:
        """For a rank whose call to its peers failed with `message`: waits for the watchdog to name who is at fault.

        Normally this process ends meanwhile. Else raises PeerLost: the peer left in good order, or is alive, or this
        process is not ours to end.
        """
        deadline = time.monotonic() + (FORGIVEN[UP] + 6) * self._pause
        while time.monotonic() < deadline:
            if self._ranks.loss is not None:
                raise PeerLost(self._ranks.loss)
            gone = [rank for rank, peer in self._peers.items() if peer.state == LEFT]
            if gone:
                raise PeerLost(f"rank {gone[0]} has left, but rank {self._ranks.place.rank} needs it: {message}")
            time.sleep(0.1)
        raise PeerLost(f"rank {self._ranks.place.rank}: {message}")

    def _say(self, state: str | None = None, text: str = "") -> None:
        """Writes this rank's pulse, in the new state if one is given."""
        with self._saying, suppress(RuntimeError):
            if state is not None:
                self._state, self._text = state, text
            self._keys.set(pulse_key(self._ranks.place.rank), f"{self._state}\n{self._rounds}\n{self._text}")

    def _watch_peers(self) -> None:
        names = [pulse_key(rank) for rank in self._peers]
        try:
            while not self._stopped.wait(self._pause):
                self._say()
                for peer, pulse in zip(self._peers.values(), self._keys.multi_get(names), strict=True):
                    peer.hear(pulse)
                self._rounds += 1
                self._judge()
        except RuntimeError:
            self._lose_store()

    def _watch_store(self) -> None:
        rounds, silent = self._rounds, 0
        while not self._stopped.wait(self._pause):
            silent = silent + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if silent >= FORGIVEN[UP]:
                self._miss_store("stopped answering")

    def _lose_store(self) -> None:
        """The store's host has ended: because of its own death, unless there is another reason."""
        suspects = [rank for rank, peer in self._peers.items() if rank and peer.rounds >= FORGIVEN[UP] // 2]
        if self._state == LEFT:  # rank 0 was quicker to leave
            self._stopped.set()
        elif suspects:  # rank 0 was quicker to accuse them, has said so, and has ended
            self._ranks.end(None)
        else:
            self._miss_store("is gone")

    def _miss_store(self, what: str) -> None:
        if self._meeting.launcher_store:
            where = f"{self._meeting.host}:{self._meeting.port}"
            self._accuse([], f"the launcher {what}, and with it the store at {where} in which ranks meet", True)
        else:
            self._accuse([0], f"rank 0 {what}", True)

    def _judge(self) -> None:
        failed = [rank for rank, peer in self._peers.items() if peer.has_failed]
        silent = [rank for rank, peer in self._peers.items() if peer.is_silent]
        if failed:
            self._accuse(failed, f"rank {failed[0]} failed: {self._peers[failed[0]].text}")
        if silent:
            names = ("rank " if len(silent) == 1 else "ranks ") + ", ".join(map(str, silent))
            self._accuse(silent, f"{names} stopped answering")

    def _accuse(self, accused: Sequence[int], message: str, by_host: bool = False) -> None:
        """Ends this rank. The lowest rank that is still here speaks for all, so that there is one message.

        `by_host`: nobody can know who is still here, and the first rank of every host speaks.
        """
        place = self._ranks.place
        gone = {*accused, *(rank for rank, peer in self._peers.items() if peer.state == LEFT)}
        speaker = min((rank for rank in range(place.world_size) if rank not in gone), default=place.rank)
        speaks = place.rank == speaker or (by_host and place.local_rank == 0)
        if not speaks and self._stopped.wait(SPEECH_ROUNDS * self._pause):
            return
        if not self._stopped.is_set():
            self._ranks.end(message if speaks else None, [self._processes[rank] for rank in accused])
