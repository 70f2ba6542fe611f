"""Watchdogs of several ranks in one process, with short rounds; `test_faults.py` has real processes."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import NoReturn

import pytest
import torch.distributed as dist

from mindgen.parallel.group import PeerLost
from mindgen.parallel.launch import Ranks
from mindgen.parallel.place import Meeting, Place
from mindgen.parallel.process import Process
from mindgen.parallel.rendezvous import pulse_key
from mindgen.parallel.watchdog import FORGIVEN, LOADING, UP, Peer, Watchdog

PAUSE = 0.05
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a thread's end, here


@dataclass
class MortalRanks(Ranks):
    """Notes how it was ended instead of ending the test."""

    last_words: list[str | None] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def end(self, message, victims=()) -> NoReturn:
        self.last_words.append(message)
        self.ended.set()
        raise SystemExit


class VanishingStore:
    """A store whose host may go away. Until then all ranks live, but for the silent one."""

    gone = False

    def __init__(self, silent: int | None = None) -> None:
        self._silent, self._beats = silent, itertools.count(1)

    def _answer(self, value):
        if self.gone:
            raise dist.DistNetworkError("connection reset")
        return value

    def set(self, key: str, value: str) -> None:
        self._answer(None)

    def check(self, keys: list[str]) -> bool:
        return False

    def multi_get(self, keys: list[str]) -> list[bytes]:
        beat = f"up\n{next(self._beats)}\n".encode()
        return self._answer([b"" if key == f"pulse/{self._silent}" else beat for key in keys])


@pytest.fixture
def started():
    """Starts the watchdogs of the given ranks of a world; the others never say anything."""
    watchdogs = []

    def start(*ranks: int, world_size: int, store=None, **meeting: bool) -> list[tuple[Watchdog, MortalRanks]]:
        keys = store or dist.HashStore()
        for rank in range(world_size):
            keys.set(pulse_key(rank), "")
        pairs = []
        for rank in ranks:
            place = Place(rank, world_size, rank, world_size)
            mortal = MortalRanks(place, Meeting("127.0.0.1", 1, "job", one_host=True, **meeting))
            watchdog = Watchdog(mortal, keys, [Process("", 0, "")] * world_size, PAUSE)
            watchdog.start()
            pairs.append((watchdog, mortal))
            watchdogs.append(watchdog)
        return pairs

    yield start
    for watchdog in watchdogs:
        watchdog.leave(timeout=0)


def test_a_silent_rank_is_named_by_the_lowest_of_the_others_alone(started):
    (_, first), (_, third) = started(0, 2, world_size=3)
    assert first.ended.wait(20) and third.ended.wait(20)
    assert (first.last_words, third.last_words) == (["rank 1 stopped answering"], [None])


def test_ranks_that_answer_are_left_alone(started):
    pairs = started(0, 1, 2, world_size=3)
    time.sleep(2.5 * FORGIVEN[UP] * PAUSE)
    assert not any(mortal.ended.is_set() for _, mortal in pairs)


def test_a_rank_that_leaves_in_good_order_is_missed_by_nobody(started):
    (_, first), (leaver, _) = started(0, 1, world_size=2)
    leaver.leave(timeout=0)
    time.sleep(2.5 * FORGIVEN[UP] * PAUSE)
    assert not first.ended.is_set()


def test_who_needs_a_rank_that_has_left_hears_so(started):
    (watchdog, _), (leaver, _) = started(0, 1, world_size=2)
    leaver.leave(timeout=0)
    with pytest.raises(PeerLost, match="rank 1 has left, but rank 0 needs it: broadcast failed"):
        watchdog.explain("broadcast failed")


def test_a_failure_is_told_with_its_reason(started):
    (_, first), (failing, _) = started(0, 1, world_size=2)
    failing.fail("OSError: disk full")
    assert first.ended.wait(20)
    assert first.last_words == ["rank 1 failed: OSError: disk full"]


def test_ranks_that_rank_0_started_watch_rank_0_only(started):
    ((_, second),) = started(1, world_size=3, own_ranks=True)
    assert second.ended.wait(20)
    assert second.last_words == ["rank 0 stopped answering"]


def test_rank_0_and_a_leaver_wait_for_each_other(started):
    (first, _), (second, _) = started(0, 1, world_size=2)
    waiting = threading.Thread(target=first.leave, args=(20.0,))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    second.leave(20.0)
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_store_that_vanishes_is_rank_0_lost(started):
    store = VanishingStore()
    ((_, second),) = started(1, world_size=2, store=store)
    store.gone = True
    assert second.ended.wait(20)
    assert second.last_words == ["rank 0 is gone"]


def test_a_store_that_vanishes_because_rank_0_has_named_another_is_no_second_message(started):
    store = VanishingStore(silent=1)
    ((watchdog, third),) = started(2, world_size=3, store=store)
    while watchdog._peers[1].rounds < FORGIVEN[UP] - 3:
        time.sleep(PAUSE / 10)
    store.gone = True
    assert third.ended.wait(20)
    assert third.last_words == [None]


def test_a_launchers_store_that_vanishes_is_the_launcher_lost(started):
    store = VanishingStore()
    (_, first), (_, second) = started(0, 1, world_size=2, store=store, launcher_store=True)
    store.gone = True
    assert first.ended.wait(20) and second.ended.wait(20)
    assert first.last_words == ["the launcher is gone, and with it the store at 127.0.0.1:1 in which ranks meet"]
    assert second.last_words == [None]


def test_rank_0_may_be_the_quicker_to_leave(started):
    store = VanishingStore()
    ((watchdog, second),) = started(1, world_size=2, store=store)
    threading.Timer(0.2, lambda: setattr(store, "gone", True)).start()
    watchdog.leave(timeout=1.0)
    assert not second.ended.is_set()


def test_silence_counts_in_rounds_of_the_listener_and_a_loading_rank_has_more_of_them():
    up, loading = Peer(), Peer()
    up.hear(b"up\n1\n")
    loading.hear(f"{LOADING}\n1\n".encode())
    for _ in range(FORGIVEN[UP]):
        assert not up.is_silent
        up.hear(b"up\n1\n")
        loading.hear(f"{LOADING}\n1\n".encode())
    assert up.is_silent and not loading.is_silent
    up.hear(b"up\n2\n")
    assert not up.is_silent
