"""A draw from the whole vocabulary that sorts nothing and takes exact logarithms of a few tokens only.

The largest score + Gumbel noise is the smallest exp(-noise) / exp(score): tokens race, and the probable ones run
faster. The times are computed for all tokens in float32; those at the front are then compared exactly. A winner that
top-p filters out shows that everything ranked from it on is out as well, so the race is run again among the tokens
before it, 1 + ln(1 / top_p) times on average. The outcome is that of the plain formula.

Legend: G rows, V vocabulary, F tokens at the front.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindgen.engine.noise import arrival_times, gumbel_noise

_NEAR = 1 + 1e-4  # float32 rounding changes a time by less than that
_FRONT = 4
_FILTERED = float("-inf")


def race(scores: Tensor, seed: Tensor, position: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Token ids [G] drawn by softmax(scores), [G, V] float32, cut by top_p and min_p [G] (float64)."""
    weights = (scores - scores.amax(dim=1, keepdim=True)).exp_()
    times = arrival_times(seed, position, scores.shape[1]).div_(weights)
    if (min_p > 0).any():
        times.div_((weights >= min_p[:, None]).float())  # a division by 0 takes a token out: faster than a mask
    winners = _first(times, scores, seed, position)
    cut = (top_p < 1).nonzero().squeeze(1)
    if len(cut):
        tables = (weights, times, scores, seed, position, top_p)
        winners[cut] = _within_mass(winners[cut], *(_rows(table, cut) for table in tables))
    return winners


def _within_mass(
    winners: Tensor, weights: Tensor, times: Tensor, scores: Tensor, seed: Tensor, position: Tensor, top_p: Tensor
) -> Tensor:
    """The winners [G] once top-p has its say: a token is out if those ranked before it reach top_p of the mass."""
    reach = top_p * weights.sum(dim=1, dtype=torch.float64)
    winners, asked = winners.clone(), torch.arange(len(winners), device=winners.device)
    while len(asked):
        before = _ranked_before(_rows(scores, asked), winners[asked]).float()  # 1 or 0
        mass = (_rows(weights, asked) * before).sum(dim=1, dtype=torch.float64)
        out = (mass >= reach[asked]) & (mass > 0)  # the most probable token stays
        asked, before = asked[out], before[out]
        if len(asked):
            times[asked] = _rows(times, asked) / before
            winners[asked] = _first(times[asked], scores[asked], seed[asked], position[asked])
    return winners


def _ranked_before(scores: Tensor, tokens: Tensor) -> Tensor:
    """Which tokens rank before `tokens` [G]: higher scores, and of equal ones the smaller ids."""
    mine = scores.gather(1, tokens[:, None])
    ids = torch.arange(scores.shape[1], device=scores.device)
    return (scores > mine) | ((scores == mine) & (ids < tokens[:, None]))


def _first(times: Tensor, scores: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The tokens [G] whose exact times are the smallest, of those whose times [G, V] are finite."""
    front = times.topk(min(_FRONT, times.shape[1]), largest=False)
    keys = _keys(front.indices, front.values, scores.gather(1, front.indices), seed, position)
    best = keys.max(dim=1, keepdim=True)
    winners = front.indices.gather(1, best.indices).squeeze(1)
    highest = scores.amax(dim=1, keepdim=True).double()
    crowded = (front.values[:, -1:] <= (highest - best.values).exp() * _NEAR).squeeze(1)
    if times.shape[1] > _FRONT and crowded.any():
        ids = torch.arange(times.shape[1], device=times.device).expand(int(crowded.sum()), -1)
        keys = _keys(ids, times[crowded], scores[crowded], seed[crowded], position[crowded])
        winners[crowded] = keys.argmax(dim=1)
    return winners


def _keys(ids: Tensor, times: Tensor, scores: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The plain formula for `ids` [G, F], without those that were filtered out."""
    return (scores + gumbel_noise(seed, position, ids)).masked_fill_(times.isinf(), _FILTERED)


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """The rows of a table; all of them without a copy, because `rows` are ascending."""
    return table if len(rows) == len(table) else table[rows]
