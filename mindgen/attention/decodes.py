"""Attention of sequences with one query each, as one grouped product.

Nothing here looks at a value: what the device was asked for one step can be repeated for another of the same sizes.
S sequences, W blocks each, L = W * block_size, H query heads, G KV heads, Q = H / G, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mindgen.attention.scores import Scores, attend

if TYPE_CHECKING:
    from mindgen.engine.kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """A step in which every sequence has one query: int64 tensors on the cache's device."""

    positions: Tensor  # [S]
    is_long: Tensor  # [S] as a Batch has it, but for all tokens
    slots: Tensor  # [S]
    context: Tensor  # [S] tokens of each sequence that are in the cache, this one included
    blocks: Tensor  # [S, W] filled up with any blocks


class DecodeContext:
    """See AttentionContext; for a step of DecodeRows."""

    def __init__(self, rows: DecodeRows, cache: KVCache, scores: Scores):
        self.positions, self.is_long = rows.positions, rows.is_long
        self._slots, self._cache = rows.slots, cache
        self._decodes = Decodes(rows.blocks, rows.context, cache, scores)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._cache.write(layer, self._slots, key, value)
        return self._decodes.attend(layer, query.flatten(1, -2))


class Decodes:
    """What the queries of a step see of a cache that has their keys and values: blocks [S, W], context [S]."""

    def __init__(self, blocks: Tensor, context: Tensor, cache: KVCache, scores: Scores):
        self._blocks, self._cache, self._scores = blocks, cache, scores
        self._context = context.unsqueeze(1)
        self._columns = torch.arange(blocks.shape[1] * cache.block_size, device=blocks.device)
        self._unseen = (self._columns >= self._context)[:, :, None, None]  # [S, L, 1, 1]: behind the end
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """[S, H, D] -> [S, H, D]: one product a KV head serves all its query heads."""
        sequences, heads, head_dim = query.shape
        keys = self._gathered(self._cache.keys[layer])
        values = self._gathered(self._cache.values[layer])
        grouped = query.reshape(sequences, keys.shape[1], -1, head_dim)  # [S, G, Q, D]
        mask = self._mask(self._scores.windows[layer], keys.shape[1], query.dtype)
        return attend(grouped, keys, values, self._scores, mask).reshape(sequences, heads, head_dim)

    def _mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """Which keys each sequence sees, [S, 1, 1, L] of bool, or with ALiBi what is added, [S, G, Q, L]."""
        if window not in self._masks:
            seen = self._columns < self._context
            if window is not None:
                seen &= self._columns >= self._context - window
            bias = self._scores.bias(self._context.squeeze(1) - 1, self._columns)  # [S, H, L]
            mask = seen[:, None, None]
            if bias is not None:
                mask = bias.unflatten(1, (groups, -1)).masked_fill(~mask, float("-inf")).to(dtype)
            self._masks[window] = mask
        return self._masks[window]

    def _gathered(self, memory: Tensor) -> Tensor:
        """The keys or values of one layer, [S, G, L, D], zero where nothing is seen.

        Slots that nobody has written yet may hold anything, and 0 times NaN would still be NaN.
        """
        gathered = memory[self._blocks].flatten(1, 2)  # [S, L, G, D]
        return gathered.masked_fill_(self._unseen, 0).transpose(1, 2)
