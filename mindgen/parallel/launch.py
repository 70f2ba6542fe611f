"""How a process becomes a rank: by torchrun, by hand, or started from here; and how all of them end together.

The one that a user runs is rank 0 and stays in the foreground. It starts the others, which hear of its death through a
pipe that only it holds open; it hears of theirs as their parent. No torch is imported here: ranks start before it is.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from mindgen.parallel.place import JOB, PARENT_PIPE, Meeting, Place, read_meeting, read_place, under_launcher
from mindgen.parallel.process import Process
from mindgen.parallel.threads import threads_per_rank

__all__ = ["LocalRanks", "Ranks", "join_ranks", "start_local_ranks", "start_ranks", "under_launcher"]

LOOPBACK = "127.0.0.1"
PROGRAM = ("-m", "mindgen")
TERMINATED = 128 + signal.SIGTERM  # exit code of a program that SIGTERM ended, as shells count
# Torch, if it is not loaded yet, does not write a stack trace for every connection that a lost peer leaves behind.
QUIET = ("TORCH_CPP_LOG_LEVEL", "ERROR")
# Seconds that rank 0 gives a child's exit code before it speaks up: most likely it meets the same error and tells
# it better. 2 is a user's error, which all ranks find on their own, some of them later.
PATIENCE = {2: 10.0}
USUAL_PATIENCE = 3.0


@dataclass
class Ranks:
    """This process as a rank: its place, where it meets the others, and how it ends when one of them is lost.

    on_loss: is told the reason instead, and the process lives on. is_guest: the process is somebody's program, which
    may be silent for long without being hung.
    """

    place: Place = field(default_factory=Place)
    meeting: Meeting | None = None  # None when alone
    store: object = None  # rank 0's store lives as long as its process; filled by the first connection
    on_loss: Callable[[str], None] | None = None
    is_guest: bool = False
    loss: str | None = None  # why this rank cannot go on, once `on_loss` has been told
    _ending: threading.Lock = field(default_factory=threading.Lock)

    def end(self, message: str | None, victims: Iterable[Process] = ()) -> NoReturn:
        """Ends this process now, with exit code 1, whatever its threads do; `victims` go with it.

        The first caller's message (none if None) goes to stderr; who comes second waits here for the end. With
        `on_loss` only the thread that calls ends.
        """
        if self.on_loss is not None:
            self._lose(self.on_loss, message)
        self._ending.acquire()
        if message is not None:
            _flush_output()
            os.write(2, f"mindgen: {message}\n".encode(errors="replace"))
        for victim in victims:
            victim.kill()
        self.kill_children()
        os._exit(1)

    def kill_children(self) -> None:
        """Only a rank that started others has any."""

    def _lose(self, on_loss: Callable[[str], None], message: str | None) -> NoReturn:
        if self._ending.acquire(blocking=False):
            self.loss = message or "a rank was lost; another one says which"
            on_loss(self.loss)
            self.kill_children()
        raise SystemExit(1)  # of this thread; see start_thread


def start_thread(work: Callable[[], None], name: str) -> None:
    """A thread that may be in the middle of anything when the process ends, and itself ends by SystemExit quietly."""

    def run() -> None:
        with suppress(SystemExit):
            work()

    threading.Thread(target=run, name=name, daemon=True).start()


def _flush_output() -> None:
    """Text already generated is not lost. In a thread, since who holds the stream may never let go of it."""
    flushing = threading.Thread(target=lambda: sys.stdout.flush(), daemon=True)
    flushing.start()
    flushing.join(0.5)


@dataclass
class LocalRanks(Ranks):
    """Rank 0 and the ranks of this host that it started."""

    children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    pipe: int = -1  # the write end; nothing is ever written
    _closing: threading.Event = field(default_factory=threading.Event)

    def close(self, patience: float = 10.0) -> None:
        """Gives children `patience` seconds to end on their own, then ends them. None is left when it returns."""
        self._closing.set()
        try:
            self._wait(patience)
            for child in self._running():
                child.terminate()
            self._wait(2.0)
        finally:
            self.kill_children()
            if self.pipe >= 0:
                os.close(self.pipe)
            self.pipe = -1

    def kill_children(self) -> None:
        for child in self.children.values():
            child.kill()
        self._wait(2.0)

    def watch(self) -> None:
        """Looks after the children, from a thread of its own, until `close`."""
        start_thread(self._watch, "children")

    def _watch(self) -> None:
        noticed: dict[int, float] = {}
        while not self._closing.wait(0.1):
            for rank, code in self._ended():
                waited = time.monotonic() - noticed.setdefault(rank, time.monotonic())
                overdue = code < 0 or waited > PATIENCE.get(code, USUAL_PATIENCE)
                if overdue and not self._closing.is_set():
                    self.end(f"rank {rank} {_describe_exit(code)}")

    def _ended(self) -> list[tuple[int, int]]:
        codes = [(rank, child.poll()) for rank, child in self.children.items()]
        return [(rank, code) for rank, code in codes if code]

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [child for child in self.children.values() if child.poll() is None]

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.02)


def _describe_exit(code: int) -> str:
    return f"died (killed by signal {-code})" if code < 0 else f"ended with exit code {code}"


@contextmanager
def start_ranks(
    world_size: int | None,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> Iterator[Ranks]:
    """Makes this process a rank of `world_size` (None: as many as a launcher started, else one) while the block runs.

    A rank that a launcher started stays what it is; without a launcher this process becomes rank 0 and starts the
    others with the same `argv`. They have ended when the block is left. Raises ValueError when the launcher's
    variables make no sense or give another number of ranks.
    """
    environ = os.environ if environ is None else environ
    os.environ.setdefault(*QUIET)
    if under_launcher(environ):
        yield join_ranks(environ, world_size)
    elif world_size is None or world_size == 1:
        yield Ranks()
    else:
        with _run_local_ranks(start_local_ranks(world_size, argv, environ, program)) as ranks:
            yield ranks


def join_ranks(
    environ: Mapping[str, str],
    world_size: int | None = None,
    on_loss: Callable[[str], None] | None = None,
    is_guest: bool = False,
) -> Ranks:
    """This process as the rank that its launcher made it. `world_size` is what the user asked for, if anything."""
    place = read_place(environ)
    if world_size is not None and world_size != place.world_size:
        raise ValueError(
            f"{world_size} ranks are asked for (tensor x pipeline parallel size), but the launcher started"
            f" {place.world_size} (WORLD_SIZE); make them equal, with torchrun by --nproc_per_node and --nnodes"
        )
    meeting = read_meeting(environ) if place.world_size > 1 else None
    ranks = Ranks(place, meeting, on_loss=on_loss, is_guest=is_guest)
    if PARENT_PIPE in environ:
        _watch_parent(ranks, int(environ[PARENT_PIPE]))
    elif place.rank > 0 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun passes Ctrl-C to all; only rank 0 has words for it
    return ranks


def _watch_parent(ranks: Ranks, pipe: int) -> None:
    """Ends this rank when rank 0 is gone, even by kill -9. The first of the others says so."""

    def watch() -> None:
        with suppress(OSError):
            os.read(pipe, 1)
        ranks.end("rank 0 died" if ranks.place.rank == 1 else None)

    start_thread(watch, "parent")


def start_local_ranks(
    world_size: int,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
    on_loss: Callable[[str], None] | None = None,
    is_guest: bool = False,
) -> LocalRanks:
    """Starts ranks 1 to world_size - 1 on this host as `python <program> <argv>`; the caller is rank 0.

    Children read nothing (their stdin is empty), write to our stderr only, and ignore Ctrl-C, whose meaning rank 0
    decides. Nothing listens beyond loopback. Whoever calls this must `close` what it gets, as `start_ranks` does.
    """
    environ = os.environ if environ is None else environ
    read_end, write_end = os.pipe()
    listener = socket.create_server((LOOPBACK, 0), backlog=max(128, world_size))
    job, port = secrets.token_hex(8), listener.getsockname()[1]
    common = {
        QUIET[0]: QUIET[1],
        **environ,
        PARENT_PIPE: str(read_end),
        JOB: job,
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }
    meeting = Meeting(LOOPBACK, port, f"mindgen/{job}", one_host=True, own_ranks=True, listener=listener)
    place = Place(0, world_size, 0, world_size)
    ranks = LocalRanks(place, meeting, on_loss=on_loss, is_guest=is_guest, pipe=write_end)
    try:
        with _interrupts_ignored():
            for rank in range(1, world_size):
                variables = {**environ, **common, **_rank_variables(rank, world_size, environ)}
                ranks.children[rank] = _start([sys.executable, *program, *argv], variables, read_end)
    except BaseException:
        ranks.close(patience=0)
        raise
    finally:
        os.close(read_end)
    ranks.watch()
    return ranks


def _rank_variables(rank: int, world_size: int, environ: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        QUIET[0]: environ.get(*QUIET),
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", str(threads_per_rank(world_size))),
    }


def _start(command: Sequence[str], variables: Mapping[str, str], pipe: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=dict(variables), stdin=subprocess.DEVNULL, stdout=2, pass_fds=(pipe,))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside inherit that Ctrl-C is blocked, and from the main thread, which alone can set handlers,
    that it is ignored; one that comes meanwhile reaches us afterwards."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _run_local_ranks(ranks: LocalRanks) -> Iterator[LocalRanks]:
    """Closes `ranks` however the block is left; SIGTERM leaves it too. After an error children get a second only."""
    patience = 10.0
    with _terminated_as_exit():
        try:
            yield ranks
        except BaseException as error:
            patience = 1.0 if isinstance(error, Exception) else 0.0
            raise
        finally:
            ranks.close(patience)


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
