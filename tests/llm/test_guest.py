"""A rank that is a guest in somebody's program: nothing of it ends the process, and its silence is forgiven."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from mindgen.parallel.group import PeerLost
from mindgen.parallel.launch import Ranks, start_thread
from mindgen.parallel.place import Meeting, Place
from mindgen.parallel.process import Process
from mindgen.parallel.watchdog import FORGIVEN, GUEST, UP, Peer, Watchdog


def test_a_loss_is_told_once_and_ends_only_the_threads_that_notice() -> None:
    told: list[str] = []
    ranks = Ranks(on_loss=told.append)
    ended = [threading.Event() for _ in range(2)]

    def notice(number: int) -> None:
        try:
            ranks.end(f"reason {number}")
        finally:
            ended[number].set()

    for number in range(2):
        start_thread(lambda number=number: notice(number), "notices")
        assert ended[number].wait(20)
    assert told == ["reason 0"] and ranks.loss == "reason 0"


def guest() -> tuple[Watchdog, Ranks, dist.HashStore]:
    meeting = Meeting("127.0.0.1", 1, "job", one_host=True, own_ranks=True)
    ranks, keys = Ranks(Place(0, 2, 0, 2), meeting, on_loss=lambda reason: None, is_guest=True), dist.HashStore()
    return Watchdog(ranks, keys, [Process("", 0, "")] * 2), ranks, keys


def test_a_guest_says_that_it_is_one_also_after_loading() -> None:
    watchdog, _, keys = guest()
    with watchdog.loading():
        assert keys.get("pulse/0").startswith(b"loading\n")
    assert keys.get("pulse/0").startswith(f"{GUEST}\n".encode())


def test_the_silence_of_a_guest_is_forgiven_for_minutes() -> None:
    silent, hung = Peer(), Peer()
    for _ in range(100 * FORGIVEN[UP]):
        silent.hear(f"{GUEST}\n1\n".encode())
        hung.hear(f"{UP}\n1\n".encode())
    assert hung.is_silent and not silent.is_silent


def test_a_thread_in_a_collective_hears_why_it_failed() -> None:
    watchdog, ranks, _ = guest()
    with pytest.raises(SystemExit):
        ranks.end("rank 1 died")
    with pytest.raises(PeerLost, match="rank 1 died"):
        watchdog.explain("broadcast failed")
