"""A row of results: what the sampler says about one row, and how it is laid out on its way to rank 0.

A row of float64, which holds every token id exactly: the token, its log-probability, then for each alternative its
token id, log-probability and noise. All rows of a step are as wide as the one that asked for most alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan

NO_TOKEN = -1  # stands for the token of a row without usable logits, and for alternatives that do not exist
NO_LOGPROB = nan  # where nobody asked for it


@dataclass(frozen=True)
class Candidate:
    """One alternative. `noise` is 0 unless beams are sampled; then alternatives are ranked by logprob + noise."""

    token: int
    logprob: float
    noise: float = 0.0


@dataclass(frozen=True)
class Sampled:
    """The outcome of one row. `token` is None if the model gave no usable logits: NaN, or nothing above -inf.

    `logprob` is None if nobody asked for it.
    """

    token: int | None
    logprob: float | None
    top: tuple[Candidate, ...] = ()


def row_width(most_top: int) -> int:
    """The length of a row with `most_top` alternatives."""
    return 2 + 3 * most_top


def read_row(row: list[float], num_top: int) -> Sampled:
    """The outcome of a row that asked for `num_top` alternatives."""
    token, logprob = row[:2]
    top = [Candidate(int(row[at]), row[at + 1], row[at + 2]) for at in range(2, row_width(num_top), 3)]
    known = tuple(candidate for candidate in top if candidate.token != NO_TOKEN)
    return Sampled(None if token == NO_TOKEN else int(token), None if isnan(logprob) else logprob, known)
