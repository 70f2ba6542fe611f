"""What the scheduler admits, runs and preempts as one."""

from __future__ import annotations

from dataclasses import dataclass

from mindgen.engine.request import Sequence, Status


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
