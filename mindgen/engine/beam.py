"""Beam search over candidates, as transformers does it: the same tokens in the same order.

Pure bookkeeping: what the beams' rows have to say comes in, which beams go on comes out. Scores are rounded to float32
after every operation, because transformers keeps them so; a different rounding would break ties differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass

from mindgen.engine.results import Candidate

_WORST = -1.0e9  # transformers' score of a beam that does not exist


@dataclass(frozen=True)
class Beam:
    """Generated tokens and the sum of their (processed) log-probabilities. `parent` numbers the beam it continues."""

    tokens: tuple[int, ...]
    score: float
    parent: int = 0


@dataclass(frozen=True)
class _Continuation:
    beam: Beam
    rank: float  # the score, plus noise where beams are sampled


class BeamSearch:
    """The state of one search.

    num_beams beams go on at a time. A beam ends with one of `end_ids` or after `max_new_tokens`; ended beams are
    ranked by score / length**length_penalty. The search stops when no running beam can beat the worst of num_beams
    ended ones at its present length (transformers' early_stopping=False).
    """

    def __init__(self, num_beams: int, length_penalty: float, end_ids: frozenset[int], max_new_tokens: int) -> None:
        self.num_beams = num_beams
        self.length_penalty = length_penalty
        self.end_ids = end_ids
        self.max_new_tokens = max_new_tokens
        self.running = [Beam((), 0.0)]
        self.ended: list[Beam] = []  # best first; their scores have the length penalty in them
        self.length = 0

    @property
    def done(self) -> bool:
        """True if no beam goes on."""
        return not self.running

    def advance(self, rows: Sequence[Sequence[Candidate]]) -> None:
        """One token more: `rows` holds the candidates of every running beam, in order."""
        self.length += 1
        chosen = self._choose(rows)
        going_on = [item.beam for item in chosen if not self._ends(item.beam)]
        self._collect([item.beam for item in chosen[: self.num_beams] if self._ends(item.beam)])
        going_on.sort(key=lambda beam: -beam.score)
        self.running = going_on[: self.num_beams]
        if not self._can_improve():
            self.running = []

    def _choose(self, rows: Sequence[Sequence[Candidate]]) -> list[_Continuation]:
        """The best continuations of all beams. Enough of them that num_beams remain if every end token is chosen."""
        continuations = [
            _continue(number, beam, candidate)
            for number, (beam, row) in enumerate(zip(self.running, rows, strict=True))
            for candidate in row
        ]
        continuations.sort(key=lambda item: -item.rank)
        return continuations[: max(2, 1 + len(self.end_ids)) * self.num_beams]

    def _ends(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self.end_ids or len(beam.tokens) >= self.max_new_tokens

    def _collect(self, beams: list[Beam]) -> None:
        """Only the first num_beams continuations may end as an answer; the others are spare."""
        ranked = [Beam(beam.tokens, self._penalised(beam.score), beam.parent) for beam in beams]
        self.ended = sorted(self.ended + ranked, key=lambda beam: -beam.score)[: self.num_beams]

    def _can_improve(self) -> bool:
        if not self.running:
            return False
        full = len(self.ended) == self.num_beams
        return self._penalised(self.running[0].score) > (self.ended[-1].score if full else _WORST)

    def _penalised(self, score: float) -> float:
        return single(score / single(self.length**self.length_penalty))


def single(number: float) -> float:
    """The nearest float32."""
    return c_float(number).value


def _continue(number: int, beam: Beam, candidate: Candidate) -> _Continuation:
    score = single(beam.score + candidate.logprob)
    return _Continuation(Beam((*beam.tokens, candidate.token), score, number), score + candidate.noise)
