"""Shared memory between ranks that are threads here; `group_program.py` has real ranks, and gloo to compare with."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from mindgen.parallel.arena import Arena, Sharing, share_memory
from mindgen.parallel.group import FOREVER, MOST_BYTES, PeerLost
from mindgen.parallel.process import Process
from mindgen.parallel.shm import SLOT_BYTES, SharedGroup
from mindgen.parallel.waiting import Patience

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no anonymous files")
PASSWORD = b"0123456789abcdef"
BYTE = torch.zeros(1, dtype=torch.uint8)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.make(PASSWORD)
    yield made
    made.close()


@pytest.fixture
def pair(arena) -> Iterator[Callable[..., tuple[SharedGroup, SharedGroup]]]:
    """Makes both ranks of a group of two; the second one's process may be another than this."""
    second = Arena.open(Process.mine(), arena.descriptor, PASSWORD)

    def make(other: Process | None = None) -> tuple[SharedGroup, SharedGroup]:
        processes = (Process.mine(), other or Process.mine())
        return SharedGroup(range(2), 0, arena, processes), SharedGroup(range(2), 1, second, processes)

    yield make
    second.close()


@pytest.fixture
def ended_process() -> Iterator[Process]:
    """One that has ended, though its parent has not asked for it yet."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process.at(child.pid)
        assert process.is_alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        yield process


def test_another_file_is_not_taken_for_the_ranks_memory(arena):
    with pytest.raises(OSError, match="is not the ranks' memory"):
        Arena.open(Process.mine(), arena.descriptor, b"fedcba9876543210")


def test_memory_is_given_once(arena):
    offsets = [arena.take(size) for size in (1, 5000, 4096, 1)]
    assert [after - before for before, after in itertools.pairwise(offsets)] == [4096, 8192, 4096]


CALLS: dict[str, Callable[[SharedGroup, float], object]] = {
    "all_reduce": lambda group, timeout: group.all_reduce(torch.ones(3), timeout),
    "all_gather": lambda group, timeout: group.all_gather(torch.ones(SLOT_BYTES), 0, timeout),
    "broadcast": lambda group, timeout: group.broadcast(torch.ones(3), 1, timeout),
    "receive": lambda group, timeout: group.receive(torch.ones(3), 1, timeout),
    "barrier": lambda group, timeout: group.barrier(timeout),
}
every_call = pytest.mark.parametrize("name", list(CALLS))


@every_call
def test_a_peer_that_says_nothing_is_an_error_after_the_deadline(pair, name):
    with pytest.raises(PeerLost, match=f"^{name} among ranks 0, 1 failed: rank 1 said nothing for 0.05 s$"):
        CALLS[name](pair()[0], 0.05)


@every_call
def test_a_peer_that_has_ended_is_named_however_long_one_would_wait(pair, name, ended_process):
    with pytest.raises(PeerLost, match=f"^{name} among ranks 0, 1 failed: rank 1 has ended$"):
        CALLS[name](pair(ended_process)[0], FOREVER)


def test_a_peer_that_has_left_is_named_but_what_it_said_before_counts(pair):
    first, second = pair()
    for group in (first, second):
        group.send(torch.tensor([group.rank]), 1 - group.rank)
    second.close()
    assert first.receive(torch.zeros(1, dtype=torch.int64), 1).item() == 1
    with pytest.raises(PeerLost, match="rank 1 has left"):
        first.receive(torch.zeros(1, dtype=torch.int64), 1, FOREVER)


def test_a_pause_of_all_ranks_is_no_silence(monkeypatch):
    """As after Ctrl-Z and fg: the clock has run on, and the peer answers as soon as it runs again."""

    class Pausing:
        words: ClassVar = [0]
        naps, now = 0, 0.0

        def sleep(self, index: int, value: int) -> None:
            self.naps, self.now = self.naps + 1, self.now + 1000.0
            self.words[0] = self.naps // 3

    stretch = Pausing()
    monkeypatch.setattr("mindgen.parallel.waiting.time", SimpleNamespace(monotonic=lambda: stretch.now))
    Patience(crowded=True, lost=lambda rank: None).wait(stretch, 0, 1, rank=1, timeout=60.0)
    assert stretch.naps == 3


def test_a_message_of_another_size_is_refused(pair):
    first, second = pair()
    first.send(torch.zeros(4), 1)
    with pytest.raises(AssertionError, match="rank 0 sent 16 bytes where 12 are expected"):
        second.receive(torch.zeros(3), 0)


def test_a_sender_far_ahead_waits_and_hears_that_nobody_will_receive(pair, ended_process):
    first, _ = pair(ended_process)
    with pytest.raises(PeerLost, match="^send among ranks 0, 1 failed: rank 1 has ended"):
        first.send(BYTE.expand(2 * MOST_BYTES), 1)


def test_closing_waits_until_all_sends_are_with_the_receiver(pair):
    first, second = pair()
    sent = torch.arange(3 << 20)  # 24 MiB, many times the ring
    first.send(sent, 1)
    closing = threading.Thread(target=first.close)
    closing.start()
    received = second.receive(torch.zeros_like(sent), 0)
    closing.join(60)
    assert not closing.is_alive()
    assert torch.equal(received, sent)


def test_a_call_in_inference_mode_spoils_nothing_for_one_outside(pair):
    first, second = pair()
    results = []

    def reduce_twice(group: SharedGroup) -> None:
        with torch.inference_mode():
            group.all_reduce(torch.ones(2))
        results.append(group.all_reduce(torch.ones(2)).tolist())

    other = threading.Thread(target=reduce_twice, args=(second,))
    other.start()
    reduce_twice(first)
    other.join(60)
    assert results == [[2.0, 2.0]] * 2


def agree(processes: list[Process], *wanted: bool) -> list[Sharing]:
    """What every rank decides."""
    keys, found = dist.HashStore(), {}

    def decide(rank: int) -> None:
        found[rank] = share_memory(keys, rank, processes, wanted[rank] if wanted else True)

    threads = [threading.Thread(target=decide, args=(rank,)) for rank in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(len(processes))]


def on(host: str) -> Process:
    return Process(host, os.getpid(), Process.mine().start)


class TestAgreeing:
    def test_ranks_of_one_host_share_and_those_of_two_do_not(self):
        for sharing in agree([on("a"), on("b"), on("a"), on("b")]):
            assert sharing.covers((0, 2)) and sharing.covers((1, 3))
            assert not sharing.covers((0, 1)) and not sharing.covers(range(4))
            assert sharing.arena is not None and sharing.reason == ""

    def test_one_rank_that_does_not_want_to_is_left_alone_without_a_word(self):
        for unwilling in range(3):
            for sharing in agree([on("a")] * 3, *(rank != unwilling for rank in range(3))):
                assert not sharing.covers(range(3))
                assert unwilling == 0 or sharing.reason == ""

    def test_ranks_that_cannot_see_each_other_share_nothing_and_say_why(self, ended_process):
        hidden = Process("a", ended_process.pid, ended_process.start)
        for sharing in agree([on("a"), hidden]):
            assert not sharing.covers((0, 1))
            assert sharing.reason == f"process {hidden.pid} of rank 1 cannot be seen from here"

    def test_a_first_rank_that_cannot_share_is_everybodys_reason(self, monkeypatch):
        def refuse(password: bytes) -> Arena:
            raise OSError("no memory to share")

        monkeypatch.setattr(Arena, "make", refuse)
        for sharing in agree([on("a"), on("a")]):
            assert not sharing.covers((0, 1)) and sharing.reason == "no memory to share"

    def test_processors_that_reorder_stores_share_nothing(self, monkeypatch):
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        for sharing in agree([on("a"), on("a")]):
            assert not sharing.covers((0, 1)) and sharing.reason.startswith("aarch64 processors may reorder")

    def test_where_proc_does_not_tell_nothing_is_shared(self):
        for sharing in agree([Process("", os.getpid(), "")] * 2):
            assert not sharing.covers((0, 1)) and "no /proc" in sharing.reason
