"""The line in which units wait, against a plain list that is looked through from its beginning; and its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from mindgen.engine.blocks import BlockPool
from mindgen.engine.request import Request, SamplingParams, Sequence
from mindgen.engine.scheduler import Scheduler
from mindgen.engine.units import MOST_OVERTAKEN, Line, Unit
from tests.engine.test_scheduler import answer, lengths, sequence


@dataclass
class Twins:
    """A line, and what it should be."""

    random: Random
    line: Line = field(default_factory=Line)
    plain: list[Unit] = field(default_factory=list)
    ran: list[Unit] = field(default_factory=list)
    needs: dict[Unit, int] = field(default_factory=dict)

    def join(self) -> None:
        params = SamplingParams(n=self.random.choice([1, 1, 1, 2]))
        unit = Unit([Sequence.start(Request(0, (1,), params), seed=0)])
        self.needs[unit] = self.random.choice([5, 20, 21, 22, 23])
        self.line.join(unit, self.needs[unit])
        self.plain.append(unit)

    def leave(self) -> None:
        if self.plain:
            self.line.leave(self.plain.pop(self.random.randrange(len(self.plain))))

    def send_back(self) -> None:
        if self.ran:
            unit = self.ran.pop(self.random.randrange(len(self.ran)))
            self.line.send_back(unit, self.needs[unit])
            self.plain.insert(0, unit)

    def admit(self) -> int:
        """Lets the first in who fits into some room; how many stood before that one, or -1."""
        places, blocks = self.random.choice([1, 2]), self.random.choice([2, 10, 10, 10, 21, 25])
        found = self._first_fit(places, blocks)
        assert self.line.first_fit(places, blocks, lambda unit: 0) is found
        if found is None:
            return -1
        place = self.plain.index(found)
        counts = [unit.num_overtaken + (index < place) for index, unit in enumerate(self.plain)]
        self.line.overtake(found)
        assert [unit.num_overtaken for unit in self.plain] == counts
        self.ran.append(self.plain.pop(place))
        return place

    def _first_fit(self, places: int, blocks: int) -> Unit | None:
        for unit in self.plain:
            if unit.width <= places and self.needs[unit] <= blocks:
                return unit
            if unit.num_overtaken >= MOST_OVERTAKEN:
                return None
        return None


def test_a_line_of_any_length_lets_in_whom_a_look_at_each_would() -> None:
    places = []
    for seed in range(100):
        twins = Twins(Random(seed))
        for _ in range(150):
            event = twins.random.choice("jjjjjjaaaasl")
            if event == "a":
                places.append(twins.admit())
            else:
                {"j": twins.join, "s": twins.send_back, "l": twins.leave}[event]()
            assert list(twins.line) == twins.plain and len(twins.line) == len(twins.plain)
    far, none = sum(place >= 16 for place in places), places.count(-1)
    assert far > 100 and none > 100 and places.count(0) > 100, (far, none, places.count(0))


def test_what_is_shared_counts_for_those_near_the_front() -> None:
    line, units = Line(), [Unit([Sequence.start(Request(0, (1,)), seed=0)]) for _ in range(3)]
    for unit in units:
        line.join(unit, 10)
    assert line.first_fit(1, 9, {units[0]: 0, units[1]: 1, units[2]: 5}.__getitem__) is units[1]
    assert line.first_fit(1, 4, lambda unit: 5) is None


def test_of_many_only_a_few_are_asked_what_they_share() -> None:
    line, asked = Line(), []
    for _ in range(500):
        line.join(Unit([Sequence.start(Request(0, (1,)), seed=0)]), 10)
    assert line.first_fit(1, 9, lambda unit: asked.append(unit) or 0) is None
    assert asked == list(line)[: len(asked)] and len(asked) < 20


def crowded(count: int, pool: BlockPool) -> Scheduler:
    """One runs with 40 of 64 blocks, and `count` wait that want 30 each."""
    scheduler = Scheduler(pool)
    scheduler.submit(sequence(0, num_prompt=160))
    answer(scheduler, scheduler.schedule())
    for number in range(1, 1 + count):
        scheduler.submit(sequence(number, num_prompt=120))
    return scheduler


@pytest.mark.parametrize("count", [16, 100])
def test_one_that_fits_passes_any_number_that_wait_for_blocks(count):
    scheduler = crowded(count, BlockPool(64, 4))
    for number in range(1 + count, 4 + count):
        scheduler.submit(sequence(number, num_prompt=8))
    assert [number for number, _, _ in lengths(scheduler.schedule())] == [0, 1 + count, 2 + count, 3 + count]


def test_a_step_does_not_look_at_each_of_many_that_wait():
    class Asked(BlockPool):
        count = 0

        def blocks_for(self, num_tokens: int) -> int:
            self.count += 1
            return super().blocks_for(num_tokens)

    pool = Asked(64, 4)
    scheduler, pool.count = crowded(500, pool), 0
    assert [number for number, _, _ in lengths(scheduler.schedule())] == [0]
    assert pool.count < 50
