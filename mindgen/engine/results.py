"""A row of results: what the sampler says about one sampled row, and how it is laid out on its way to rank 0.

A row of float64, which holds every token id exactly: the token, its log-probability, then K token ids, K
log-probabilities and K noises, where K is the most alternatives that any row of the step asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_TOKEN = -1  # stands for the token of a row without usable logits, and for alternatives that do not exist


@dataclass(frozen=True)
class Candidate:
    """One alternative. `noise` is 0 unless beams are sampled; then alternatives are ranked by logprob + noise."""

    token: int
    logprob: float
    noise: float = 0.0


@dataclass(frozen=True)
class Sampled:
    """The outcome of one row. `token` is None if the model gave no usable logits: NaN, or nothing above -inf."""

    token: int | None
    logprob: float
    top: tuple[Candidate, ...] = ()


def row_width(most_top: int) -> int:
    """The length of a row with `most_top` alternatives."""
    return 2 + 3 * most_top


def read_row(row: list[float], num_top: int) -> Sampled:
    """The outcome of a row that asked for `num_top` alternatives."""
    token, logprob, *rest = row
    most = len(rest) // 3
    columns = zip(rest[:most], rest[most : 2 * most], rest[2 * most :], strict=True)
    top = [Candidate(int(token), logprob, noise) for token, logprob, noise in columns]
    known = tuple(candidate for candidate in top[:num_top] if candidate.token != NO_TOKEN)
    return Sampled(None if token == NO_TOKEN else int(token), logprob, known)
