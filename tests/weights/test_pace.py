"""A quick disk is read past the cache, a slow one through it, and what was read to find out is not lost."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from mindgen.weights.mapped import Stretch
from mindgen.weights.pace import SAMPLE, Pace

PIECE = SAMPLE // 8


class Disk:
    """Requests of one piece each, one after the other, that take as long as they are told to."""

    def __init__(self, least_rate: float):
        self.time, self.number = 0.0, 0
        self.pace = Pace(least_rate, clock=lambda: self.time)

    def read(self, seconds: float) -> list[int]:
        """The numbers of those requests that shall follow into the cache."""
        with self.pace.request(piece(self.number)) as to_follow:
            self.time += seconds
        self.number += 1
        self.time += 100  # what happens between requests does not count
        return [stretch.offset // PIECE for stretch in to_follow]


def piece(number: int) -> Stretch:
    return Stretch(Path("weights"), 1, 0, number * PIECE, PIECE)


def test_a_quick_disk_is_read_past_the_cache_to_the_end() -> None:
    disk = Disk(least_rate=PIECE)
    for _ in range(8):
        assert disk.read(1.0) == [] and disk.pace.past_cache
    assert disk.read(1e9) == [] and disk.pace.past_cache, "it was settled after the sample"


def test_a_slow_disk_is_read_through_the_cache_and_what_was_read_follows() -> None:
    disk = Disk(least_rate=PIECE)
    for _ in range(6):
        assert disk.read(1.3) == [] and disk.pace.past_cache
    assert disk.read(1.3) == list(range(7))
    assert not disk.pace.past_cache
    assert disk.read(0.0) == [7], "it was under way when the disk was found slow"


def test_a_very_slow_disk_is_known_by_its_first_request() -> None:
    disk = Disk(least_rate=PIECE)
    assert disk.read(8.1) == [0] and not disk.pace.past_cache


@pytest.mark.parametrize(("least_rate", "past_cache"), [(0, True), (inf, False)])
def test_what_is_settled_before_needs_no_sample(least_rate: float, past_cache: bool) -> None:
    pace = Pace(least_rate, clock=lambda: pytest.fail("it was measured"))
    assert pace.past_cache is past_cache


@pytest.mark.parametrize("least_rate", [0, PIECE])
def test_who_cannot_read_past_the_cache_reads_through_it(least_rate: float) -> None:
    disk = Disk(least_rate)
    disk.read(1.0)
    disk.pace.give_up()
    assert not disk.pace.past_cache
    disk.read(0.0)
    assert not disk.pace.past_cache
