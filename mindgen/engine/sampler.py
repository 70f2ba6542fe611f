"""Chooses tokens: a function of (logits, params, seed, position), row by row, with no state and no generator.

Drawing from softmax(scores) is the argmax of scores + Gumbel noise. The noise is a hash of (seed, position, token id),
so it needs no cumulative sum over the vocabulary, and last-bit differences of the logits rarely matter. Processors act
in the order of transformers: repetition penalty, temperature, top-k, top-p. No row's outcome depends on another row.

Legend: R rows, V vocabulary, K alternatives, G rows of one kind, M tokens that are still in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mindgen.engine.batch import SampleRows
from mindgen.engine.results import NO_TOKEN, row_width

_MOST_NOISES = 1 << 22  # computed at a time; the hash takes a few int64 temporaries of this size
_FIRST_LOOK = 1024  # tokens: where top-p usually ends
_FILTERED = float("-inf")


def sample(logits: Tensor, rows: SampleRows) -> Tensor:
    """Result rows [R, 2 + 3K] (float64, CPU; results.py says what is where) for `logits` [R, V] float32.

    A token's log-probability is that of the raw logits, before any processor. The device must know float64.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    scores = _penalised(_raw_scores(logits, logprobs, rows), rows)
    results = torch.full((len(rows), row_width(rows.most_top)), float(NO_TOKEN), dtype=torch.float64)
    for members, choices, noisy in _kinds(rows, vocab=logits.shape[1]):
        draw = _draw(scores, _Params.of(rows, members, logits.device), choices, noisy)
        tokens = draw.ids.gather(1, draw.keys.argmax(dim=-1, keepdim=True))  # [G, 1]
        results[members, 0] = tokens.squeeze(1).double().cpu()
        results[members, 1] = logprobs[members.to(logits.device)].gather(1, tokens).squeeze(1).double().cpu()
        _put_candidates(results, draw, members, rows)
    _put_most_probable(results, logprobs, rows)
    usable = logits.amax(dim=-1).isfinite()  # a NaN anywhere in a row is its maximum
    results[~usable.cpu()] = float(NO_TOKEN)
    return results


class Draw(NamedTuple):
    """What is left to choose from: token ids, processed scores (-inf: filtered out) and noise, each [G, M]."""

    ids: Tensor
    scores: Tensor
    noise: Tensor

    @property
    def keys(self) -> Tensor:
        """The largest one of a row wins."""
        return self.scores + self.noise


class _Params(NamedTuple):
    """The parameters of G rows, each [G], on the logits' device."""

    rows: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_keep: Tensor
    seed: Tensor
    position: Tensor

    @classmethod
    def of(cls, rows: SampleRows, members: Tensor, device: torch.device) -> _Params:
        names = ("temperature", "top_k", "top_p", "min_keep", "seed", "position")
        return cls(members.to(device), *(getattr(rows, name)[members].to(device) for name in names))


_Choices = Callable[[Tensor, _Params], tuple[Tensor, Tensor]]  # scores [G, V] -> ids, scores [G, M]


def _kinds(rows: SampleRows, vocab: int) -> Iterator[tuple[Tensor, _Choices, bool]]:
    """The rows sorted into kinds that take the same way, a bounded number at a time; the last value: with noise?"""
    drawn = rows.temperature > 0
    by_rank, by_mass = drawn & (rows.top_k > 0), drawn & (rows.top_p < 1)
    kinds: tuple[tuple[Tensor, _Choices, bool], ...] = (
        (~drawn, _everything, False),
        (drawn & ~by_rank & ~by_mass, _everything, True),
        (by_rank, _most_probable, True),
        (by_mass & ~by_rank, _nucleus, True),
    )
    for mask, choices, noisy in kinds:
        for members in mask.nonzero().squeeze(1).split(max(1, _MOST_NOISES // vocab)):
            if len(members):
                yield members, choices, noisy


def _draw(scores: Tensor, params: _Params, choices: _Choices, noisy: bool) -> Draw:
    scores = scores[params.rows]
    if not noisy:
        return Draw(*choices(scores, params), noise=scores.new_zeros(()).expand_as(scores))
    ids, scores = choices(scores / params.temperature.float()[:, None], params)
    return Draw(ids, scores, gumbel_noise(params.seed, params.position, ids))


def _raw_scores(logits: Tensor, logprobs: Tensor, rows: SampleRows) -> Tensor:
    """What processors act on: logits, but log-probabilities for beams, as in transformers."""
    if not rows.beam.any():
        return logits
    return torch.where(rows.beam.bool().to(logits.device)[:, None], logprobs, logits)


def _penalised(scores: Tensor, rows: SampleRows) -> Tensor:
    """Scores of the tokens seen so far divided (if positive) or multiplied (if negative) by the row's penalty."""
    if not len(rows.history):
        return scores
    lengths = rows.history_starts.diff()
    seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    row = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    known = rows.history < scores.shape[1]
    seen[row[known].to(scores.device), rows.history[known].to(scores.device)] = True
    penalty = rows.repetition_penalty.float().to(scores.device)[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _everything(scores: Tensor, params: _Params) -> tuple[Tensor, Tensor]:
    """All tokens are in question."""
    return torch.arange(scores.shape[1], device=scores.device).expand_as(scores), scores


def _most_probable(scores: Tensor, params: _Params) -> tuple[Tensor, Tensor]:
    """Top-k, ties with the last one included, then top-p."""
    vocab = scores.shape[1]
    rank = torch.maximum(params.top_k, params.min_keep).clamp(max=vocab)[:, None]  # [G, 1]
    most = int(rank.max())
    threshold = scores.topk(most).values.gather(1, rank - 1)
    with_ties = int((scores >= threshold).sum(dim=1).max())
    ids, kept = _ranked(scores, max(most, with_ties))
    kept = kept.masked_fill(kept < threshold, _FILTERED)
    return ids, _mass_filter(kept, _weights(kept).cumsum(1)[:, -1:], params)


def _nucleus(scores: Tensor, params: _Params) -> tuple[Tensor, Tensor]:
    """Top-p alone: a few of the most probable tokens are enough, unless they have too little of the mass."""
    vocab = scores.shape[1]
    total = _weights(scores).sum(dim=1, keepdim=True)
    most = min(_FIRST_LOOK, vocab)
    ids, kept = _ranked(scores, most)
    while most < vocab and not _reaches(kept, total, params):
        most = min(most * 16, vocab)
        ids, kept = _ranked(scores, most)
    return ids, _mass_filter(kept, total, params)


def _ranked(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Ids and scores [G, most] of the best tokens, best first; equal ones by id, so that they keep one order."""
    ids = scores.topk(most).indices.sort(dim=1).values
    scores, order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), scores


def _weights(scores: Tensor) -> Tensor:
    """Probabilities up to a factor, float64."""
    return (scores.double() - scores.amax(dim=1, keepdim=True).double()).exp()


def _reaches(scores: Tensor, total: Tensor, params: _Params) -> bool:
    """True if top_p ends above the last of the ranked tokens, whose equals may be missing here, in every row."""
    certain = scores > scores[:, -1:]
    mass = (_weights(scores) * certain).sum(dim=1)
    return bool(((mass >= params.top_p * total.squeeze(1)) & (certain.sum(dim=1) >= params.min_keep)).all())


def _mass_filter(scores: Tensor, total: Tensor, params: _Params) -> Tensor:
    """Top-p over ranked scores [G, M]: a token goes if those before it reach top_p of the `total` mass [G, 1].

    So the token that crosses top_p stays. Sums are float64 and in rank order: how many filtered tokens stand behind
    them, which other rows decide, does not change the outcome.
    """
    weights = _weights(scores)
    before = weights.cumsum(1) - weights
    top_p = params.top_p[:, None]
    filtered = (before >= top_p * total) & (top_p < 1)
    filtered &= torch.arange(scores.shape[1], device=scores.device) >= params.min_keep[:, None]
    return scores.masked_fill(filtered, _FILTERED)


def _put_candidates(results: Tensor, draw: Draw, members: Tensor, rows: SampleRows) -> None:
    """The best keys of beam rows: the beam search compares them across rows."""
    is_beam = rows.beam[members].bool()
    if is_beam.any():
        chosen = Draw(*(part[is_beam.to(part.device)] for part in draw))
        best = chosen.keys.topk(min(rows.most_top, chosen.ids.shape[1])).indices
        _put_top(results, members[is_beam], Draw(*(part.gather(1, best) for part in chosen)))


def _put_most_probable(results: Tensor, logprobs: Tensor, rows: SampleRows) -> None:
    """The most probable tokens of ordinary rows that asked for them."""
    members = ((rows.num_top > 0) & (rows.beam == 0)).nonzero().squeeze(1)
    if len(members):
        top = logprobs[members.to(logprobs.device)].topk(min(rows.most_top, logprobs.shape[1]))
        _put_top(results, members, Draw(top.indices, top.values, torch.zeros_like(top.values)))


def _put_top(results: Tensor, members: Tensor, top: Draw) -> None:
    ids = top.ids.masked_fill(top.scores == _FILTERED, NO_TOKEN)
    most = (results.shape[1] - 2) // 3
    for column, part in enumerate((ids, top.scores, top.noise)):
        start = 2 + column * most
        results[members, start : start + part.shape[1]] = part.double().cpu()


def gumbel_noise(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [G, M] float64 for seeds [G], positions [G] and token ids [G, M], all int64.

    Each row starts a splitmix64 sequence (Steele, Lea, Flood 2014) at a hash of seed and position; token id i takes
    its (i + 1)-th number, of which 52 bits make a float strictly between 0 and 1.
    """
    start = _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)
    bits = _mix(start[:, None] + (ids + 1) * _GOLDEN)
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _signed(number: int) -> int:
    return number - (1 << 64)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(state: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 products wrap around."""
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(state: Tensor, count: int) -> Tensor:
    """To the right, filling with zeros."""
    return (state >> count) & ((1 << (64 - count)) - 1)
