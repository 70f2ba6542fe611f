"""Chooses tokens: a function of (logits, params, seed, position), row by row, with no state and no generator.

Drawing from softmax(scores) is the argmax of scores + Gumbel noise. The noise is a hash of (seed, position, token id),
so it needs no cumulative sum over the vocabulary, and last-bit differences of the logits rarely matter. Processors act
in the order of transformers: penalties, temperature, top-k, top-p, min-p. No row's outcome depends on another row.

Legend: R rows, P scored rows, V vocabulary, K alternatives, G rows of one kind, M tokens that are still in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mindgen.engine.batch import SampleRows, ScoredRows
from mindgen.engine.noise import gumbel_noise
from mindgen.engine.race import race
from mindgen.engine.results import NO_LOGPROB, NO_TOKEN, row_width

_AT_A_TIME = {"cpu": 1 << 18}  # scores: a CPU computes a few rows that stay in its cache
_AT_A_TIME_ELSEWHERE = 1 << 22
_FILTERED = float("-inf")


class RowsOfAKind(NamedTuple):
    """The parameters of G rows, each [G], on the logits' device."""

    rows: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    min_keep: Tensor
    seed: Tensor
    position: Tensor

    @classmethod
    def of(cls, rows: SampleRows, members: Tensor, device: torch.device) -> RowsOfAKind:
        """The rows `members` [G]."""
        return cls(members.to(device), *(getattr(rows, name)[members].to(device) for name in cls._fields[1:]))


def sample(logits: Tensor, rows: SampleRows) -> Tensor:
    """Result rows [R, 2 + 3K] (float64, CPU; results.py says what is where) for `logits` [R, V] float32.

    A token's log-probability is that of the raw logits, before any processor. The device must know float64.
    """
    scores = _adjusted(_raw_scores(logits, rows), rows)
    results = _no_results(len(rows), rows.most_top)
    if rows.are_greedy:
        best, tokens = scores.max(dim=-1)
    else:
        best, tokens = scores.amax(dim=-1), _chosen(results, scores, rows)
    results[:, 0] = tokens
    _put_logprobs(results, logits, tokens, rows.num_top, (rows.logprob > 0) & (rows.beam == 0))
    results[~best.isfinite().cpu()] = NO_TOKEN  # a NaN anywhere in a row is its maximum
    return results


def _chosen(results: Tensor, scores: Tensor, rows: SampleRows) -> Tensor:
    """The tokens [R] of rows of any kinds; the candidates of beams go into their results."""
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=scores.device)
    for members, choose in _kinds(rows, scores):
        kind = RowsOfAKind.of(rows, members, scores.device)
        mine = scores if len(members) == len(rows) else scores[kind.rows]
        tokens[kind.rows] = choose(mine, kind)
    for members, noisy in _beams(rows, scores):
        tokens[members.to(scores.device)] = _put_candidates(results, scores, rows, members, noisy)
    return tokens


def score(logits: Tensor, rows: ScoredRows) -> Tensor:
    """Result rows [P, 2 + 3K] for tokens that are known: nothing is drawn."""
    results = _no_results(len(rows), rows.most_top)
    results[:, 0] = rows.token.double()
    everywhere = torch.ones(len(rows), dtype=torch.bool)
    _put_logprobs(results, logits, rows.token.to(logits.device), rows.num_top, everywhere)
    results[~logits.amax(dim=-1).isfinite().cpu()] = NO_TOKEN
    return results


def _no_results(num_rows: int, most_top: int) -> Tensor:
    results = torch.full((num_rows, row_width(most_top)), float(NO_TOKEN), dtype=torch.float64)
    results[:, 1] = NO_LOGPROB
    return results


# Kinds of rows

Choose = Callable[[Tensor, RowsOfAKind], Tensor]  # scores [G, V] -> tokens [G]


def _kinds(rows: SampleRows, logits: Tensor) -> Iterator[tuple[Tensor, Choose]]:
    """The rows sorted into kinds that take the same way, a bounded number at a time; beams apart."""
    single, drawn, by_rank = rows.beam == 0, rows.temperature > 0, rows.top_k > 0
    kinds: tuple[tuple[Tensor, Choose], ...] = (
        (single & ~drawn, _most_probable),
        (single & drawn & by_rank, _draw_by_rank),
        (single & drawn & ~by_rank, _draw),
    )
    for mask, choose in kinds:
        for members in _parts(mask, logits):
            yield members, choose


def _beams(rows: SampleRows, logits: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The rows of beams; the second value: with noise?"""
    for noisy in (False, True):
        for members in _parts((rows.beam > 0) & ((rows.temperature > 0) == noisy), logits):
            yield members, noisy


def _parts(mask: Tensor, logits: Tensor) -> Iterator[Tensor]:
    """The rows of a mask, a few at a time."""
    if mask.any():
        most = _AT_A_TIME.get(logits.device.type, _AT_A_TIME_ELSEWHERE)
        yield from mask.nonzero().squeeze(1).split(max(1, most // logits.shape[1]))


def _most_probable(scores: Tensor, kind: RowsOfAKind) -> Tensor:
    """Greedy."""
    return scores.argmax(dim=-1)


def _draw(scores: Tensor, kind: RowsOfAKind) -> Tensor:
    """Without top-k: nothing is sorted."""
    return race(_tempered(scores, kind), kind.seed, kind.position, kind.top_p, kind.min_p)


def _draw_by_rank(scores: Tensor, kind: RowsOfAKind) -> Tensor:
    return _ranked_draw(_tempered(scores, kind), kind).winners


def _tempered(scores: Tensor, kind: RowsOfAKind) -> Tensor:
    return scores if (kind.temperature == 1).all() else scores / kind.temperature.float()[:, None]


# What is added to scores


def _raw_scores(logits: Tensor, rows: SampleRows) -> Tensor:
    """What processors act on: logits, but log-probabilities for beams, as in transformers."""
    if rows.are_greedy or not rows.beam.any():
        return logits
    return torch.where(rows.beam.bool().to(logits.device)[:, None], torch.log_softmax(logits, dim=-1), logits)


def _adjusted(scores: Tensor, rows: SampleRows) -> Tensor:
    """Scores of seen tokens divided (if positive) or multiplied (if negative) by the row's penalty; then additions."""
    if not len(rows.seen) and not len(rows.added):
        return scores
    scores = scores.clone()
    row, token = _known(scores, rows.seen_row, rows.seen)
    if len(row):
        seen = scores[row, token]
        penalty = rows.repetition_penalty.float().to(scores.device)[row]
        scores[row, token] = torch.where(seen < 0, seen * penalty, seen / penalty)
    inside = rows.added_id < scores.shape[1]
    row, token = _known(scores, rows.added_row, rows.added_id)
    if len(row):
        scores[row, token] += rows.added[inside].float().to(scores.device)
    return scores


def _known(scores: Tensor, row: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Those within the vocabulary."""
    known = token < scores.shape[1]
    return row[known].to(scores.device), token[known].to(scores.device)


# Draws among ranked tokens


class Draw(NamedTuple):
    """What is left to choose from: token ids, processed scores (-inf: filtered out) and noise, each [G, M]."""

    ids: Tensor
    scores: Tensor
    noise: Tensor

    @property
    def keys(self) -> Tensor:
        """The largest one of a row wins."""
        return self.scores + self.noise

    @property
    def winners(self) -> Tensor:
        """Token ids [G]."""
        return self.ids.gather(1, self.keys.argmax(dim=-1, keepdim=True)).squeeze(1)


def _ranked_draw(scores: Tensor, kind: RowsOfAKind) -> Draw:
    """Top-k, ties with the last one included, then top-p and min-p."""
    vocab = scores.shape[1]
    rank = torch.where(kind.top_k > 0, torch.maximum(kind.top_k, kind.min_keep), vocab).clamp(max=vocab)[:, None]
    most = int(rank.max())
    threshold = scores.topk(most).values.gather(1, rank - 1)
    with_ties = int((scores >= threshold).sum(dim=1).max())
    ids, kept = _ranked(scores, max(most, with_ties))
    kept = _cut(kept.masked_fill(kept < threshold, _FILTERED), kind)
    return Draw(ids, kept, gumbel_noise(kind.seed, kind.position, ids))


def _ranked(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Ids and scores [G, most] of the best tokens, best first; equal ones by id, so that they keep one order."""
    ids = scores.topk(most).indices.sort(dim=1).values
    scores, order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), scores


def _cut(scores: Tensor, kind: RowsOfAKind) -> Tensor:
    """Top-p and min-p over ranked scores [G, M].

    Top-p filters a token if those before it reach top_p of the mass, so the token that crosses top_p stays. Sums are
    float64 and in rank order: how many filtered tokens stand behind them, which other rows decide, does not change the
    outcome. Min-p filters a token below a share of the best one's weight, which is 1.
    """
    weights = (scores - scores[:, :1]).exp().double()
    mass = weights.cumsum(1)
    top_p = kind.top_p[:, None]
    filtered = (mass - weights >= top_p * mass[:, -1:]) & (top_p < 1)
    filtered |= weights < kind.min_p[:, None]
    filtered &= torch.arange(scores.shape[1], device=scores.device) >= kind.min_keep[:, None]
    return scores.masked_fill(filtered, _FILTERED)


# Results


def _put_candidates(results: Tensor, scores: Tensor, rows: SampleRows, members: Tensor, noisy: bool) -> Tensor:
    """The best keys of beam rows, which the beam search compares across rows; their best tokens [G]."""
    kind = RowsOfAKind.of(rows, members, scores.device)
    scores = scores[kind.rows]
    if noisy:
        draw = _ranked_draw(_tempered(scores, kind), kind)
    else:
        ids = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        draw = Draw(ids, scores, scores.new_zeros(()).expand_as(scores))
    best = draw.keys.topk(min(rows.most_top, draw.ids.shape[1])).indices
    _put_top(results, members, Draw(*(part.gather(1, best) for part in draw)))
    return draw.winners


def _put_logprobs(results: Tensor, logits: Tensor, tokens: Tensor, num_top: Tensor, wanted: Tensor) -> None:
    """Log-probabilities of `tokens` [R] in the wanted rows, and as many of the most probable tokens as asked for."""
    if not wanted.any():
        return
    members = wanted.nonzero().squeeze(1)
    here = members.to(logits.device)
    logprobs = torch.log_softmax(logits[here], dim=-1)
    results[members, 1] = logprobs.gather(1, tokens[here, None]).squeeze(1).double().cpu()
    most = min(int(num_top[members].max()), logprobs.shape[1])
    if most:
        top = logprobs.topk(most)
        _put_top(results, members, Draw(top.indices, top.values, torch.zeros_like(top.values)))


def _put_top(results: Tensor, members: Tensor, top: Draw) -> None:
    ids = top.ids.masked_fill(top.scores == _FILTERED, NO_TOKEN)
    parts = torch.stack([ids.double(), top.scores.double(), top.noise.double()], dim=2)  # [G, K, 3]
    results[members, 2 : row_width(ids.shape[1])] = parts.flatten(1).cpu()
