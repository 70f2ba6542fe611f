"""How queries and keys make scores: what attention needs to know of a model, beside the sizes of its tensors.

N queries and L context tokens of one sequence, H query heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one stage's layers on one rank.

    scale: what products of queries and keys are multiplied by.
    windows: for each layer how many tokens a query sees, itself included; None is all before.
    softcap: scores x become softcap * tanh(x / softcap).
    slopes: [H] float32 on the model's device; a key n tokens back loses slope * n (ALiBi, Press et al. 2022).
    """

    scale: float
    windows: tuple[int | None, ...]
    softcap: float | None = None
    slopes: Tensor | None = None

    def capped(self, scores: Tensor) -> Tensor:
        """Scores after the soft cap, if there is one; may work in place."""
        if self.softcap is None:
            return scores
        return scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def bias(self, positions: Tensor, context: Tensor) -> Tensor | None:
        """What ALiBi adds to the scores of queries at `positions` [...] for keys at `context` [L]: [..., H, L]."""
        if self.slopes is None:
            return None
        distance = (context - positions.unsqueeze(-1)).float()
        return self.slopes[:, None] * distance.unsqueeze(-2)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, scores: Scores, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """query [..., N, D], keys and values [..., L, D] -> [..., N, D].

    mask: what is added to scores (in the query's dtype), or of bool, false where nothing is seen; None sees all, or
    with `causal`, which takes no mask and no soft cap, all before.
    """
    if scores.softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, scale=scores.scale)
    products = scores.capped((query.float() * scores.scale) @ keys.float().transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        products = products.masked_fill_(~mask, float("-inf"))
    elif mask is not None:
        products += mask
    return products.softmax(-1).to(values.dtype) @ values


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes [H] of all heads: powers of 2 ** (-8 / n) for n heads, n a power of two; for other numbers those of
    the next lower power, and then every other one of the next higher (the authors' own code)."""
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = _powers(lower, lower)
    if lower < num_heads:
        slopes = torch.cat([slopes, _powers(2 * lower, 2 * (num_heads - lower))[::2]])
    return slopes


def _powers(heads: int, count: int) -> Tensor:
    base = 2.0 ** (-8.0 / heads)
    return torch.tensor([math.pow(base, number + 1) for number in range(count)], dtype=torch.float32)
