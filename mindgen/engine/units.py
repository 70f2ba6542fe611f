"""What the scheduler admits, runs and preempts as one, and the line in which it waits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from mindgen.engine.request import Sequence, Status

MOST_OVERTAKEN = 8  # so many later ones may be admitted before one that waits
_LOOK_AHEAD = 16  # of those that came and wait, how many are asked what they would share
_Size = tuple[int, int]  # places and blocks


@dataclass(eq=False)
class Unit:
    """One sequence, or with `together` all beams of a search, which share a step because they are compared.

    admitted: among those that run, else it waits. num_overtaken: how often a later one was admitted before it.
    """

    sequences: list[Sequence]
    together: bool = False
    admitted: bool = False
    num_overtaken: int = 0

    @property
    def width(self) -> int:
        """How many sequences it may become."""
        first = self.sequences[0]
        return first.request.params.num_beams if self.together else first.num_samples

    @property
    def in_flight(self) -> bool:
        """True if one of its sequences is part of a step whose results are not back yet."""
        if len(self.sequences) == 1:
            return self.sequences[0].in_flight
        return any(sequence.in_flight for sequence in self.sequences)

    @property
    def is_behind(self) -> bool:
        """True if more than the last token of a sequence is left to compute."""
        if len(self.sequences) == 1:
            return self.sequences[0].num_left > 1
        return any(sequence.num_left > 1 for sequence in self.sequences)

    def admit(self) -> None:
        self._mark(Status.RUNNING)

    def send_back(self) -> None:
        """It waits again, and everything is left to compute."""
        self._mark(Status.WAITING)
        for sequence in self.sequences:
            sequence.num_computed = 0

    def _mark(self, status: Status) -> None:
        self.admitted = status is Status.RUNNING
        for sequence in self.sequences:
            sequence.status = status


class Line:
    """The units that wait: those that were sent back, the last of them first, then the others as they came.

    One that fits may pass any number that do not, but nobody passes one that was overtaken MOST_OVERTAKEN times. What a
    unit takes does not change while it waits, so those of one size count as one here: who fits is found in as many
    looks as there are sizes, however many wait.
    """

    def __init__(self) -> None:
        self._returned: OrderedDict[Unit, _Size] = OrderedDict()
        self._arrived: OrderedDict[Unit, _Size] = OrderedDict()  # none was overtaken more often than one before it
        self._by_size: dict[_Size, OrderedDict[Unit, int]] = {}  # of those that arrived, with their numbers
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._returned) + len(self._arrived)

    def __iter__(self) -> Iterator[Unit]:
        return chain(self._returned, self._arrived)

    def join(self, unit: Unit, blocks: int) -> None:
        """At the end, one that never ran and wants so many blocks for its tokens."""
        size = self._arrived[unit] = (unit.width, blocks)
        self._by_size.setdefault(size, OrderedDict())[unit] = self._num_arrived
        self._num_arrived += 1

    def send_back(self, unit: Unit, blocks: int) -> None:
        """To the front, one that ran."""
        self._returned[unit] = (unit.width, blocks)
        self._returned.move_to_end(unit, last=False)

    def leave(self, unit: Unit) -> None:
        """Whether it is admitted or has ended."""
        if self._returned.pop(unit, None) is None:
            size = self._arrived.pop(unit)
            alike = self._by_size[size]
            del alike[unit]
            if not alike:
                del self._by_size[size]

    def overtake(self, unit: Unit) -> None:
        """It is admitted before all that stand in front of it."""
        for earlier in self:
            if earlier is unit:
                break
            earlier.num_overtaken += 1
        self.leave(unit)

    def first_fit(self, places: int, blocks: int, num_shared: Callable[[Unit], int]) -> Unit | None:
        """The first that fits and may go. `num_shared`: how many blocks of a unit others use already; only those near
        the front are asked, since it takes a look at their tokens."""
        near = chain(self._returned.items(), islice(self._arrived.items(), _LOOK_AHEAD))
        for unit, (width, need) in near:
            if width <= places and (need <= blocks or need - num_shared(unit) <= blocks):
                return unit
            if unit.num_overtaken >= MOST_OVERTAKEN:
                return None
        return self._first_of_a_size(places, blocks)

    def _first_of_a_size(self, places: int, blocks: int) -> Unit | None:
        heads = (
            next(iter(units.items()))
            for (width, need), units in self._by_size.items()
            if width <= places and need <= blocks
        )
        return min(heads, key=lambda head: head[1], default=(None, 0))[0]
