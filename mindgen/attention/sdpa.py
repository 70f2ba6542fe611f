"""Flash attention through torch's scaled_dot_product_attention, on every device that torch has it for.

Sequences with one query (decodes) run together as one grouped product; prompts run one by one without a mask.
T tokens, S decoding sequences, L longest context, H query heads, G KV heads, Q = H / G, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mindgen.attention.reference import visible

if TYPE_CHECKING:
    from mindgen.engine.batch import Batch
    from mindgen.engine.kv_cache import KVCache


class SdpaAttention:
    """See AttentionBackend."""

    name = "sdpa"

    def __init__(self, window: int | None):
        self.window = window

    def prepare(self, batch: Batch, cache: KVCache | None) -> SdpaContext:
        return SdpaContext(batch, cache, self.window)


class SdpaContext:
    """See AttentionContext. What all layers share (masks, block indices) is made once."""

    def __init__(self, batch: Batch, cache: KVCache | None, window: int | None):
        self._cache, self._window = cache, window
        self._device = torch.device("cpu") if cache is None else cache.keys[0].device
        self.positions = batch.positions.to(self._device)
        self._slots = batch.slots.to(self._device)
        starts, lengths = batch.query_starts.tolist(), batch.context_lens.tolist()
        counts = [stop - start for start, stop in pairwise(starts)]
        single = [index for index, count in enumerate(counts) if count == 1 and cache is not None]
        self._prompts = [
            _Prompt(starts[index], counts[index], lengths[index], self._blocks(batch, index, lengths[index]))
            for index in range(len(counts))
            if counts[index] > 1 or cache is None
        ]
        self._decodes = self._gather(batch, single, starts, lengths) if single else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._cache is not None:
            self._cache.write(layer, self._slots, key, value)
        output = torch.empty_like(query)
        if self._decodes is not None:
            output[self._decodes.rows] = self._decode(layer, query[self._decodes.rows])
        for prompt in self._prompts:
            rows = slice(prompt.start, prompt.start + prompt.count)
            output[rows] = self._prompt(layer, prompt, query[rows], key[rows], value[rows])
        return output

    def _blocks(self, batch: Batch, index: int, length: int) -> Tensor:
        if self._cache is None:
            return torch.empty(0, dtype=torch.int64)
        return batch.block_tables[index, : -(-length // self._cache.block_size)].to(self._device)

    def _gather(self, batch: Batch, single: list[int], starts: list[int], lengths: list[int]) -> _Decodes:
        assert self._cache is not None
        longest = max(lengths[index] for index in single)
        width = -(-longest // self._cache.block_size)
        context = batch.context_lens[single].unsqueeze(1)  # [S, 1]
        columns = torch.arange(width * self._cache.block_size)
        seen = columns < context
        if self._window is not None:
            seen &= columns >= context - self._window
        return _Decodes(
            rows=torch.tensor([starts[index] for index in single], device=self._device),
            blocks=batch.block_tables[single, :width].to(self._device),
            seen=seen[:, None, None].to(self._device),
            unseen=(~seen)[:, :, None, None].to(self._device),
        )

    def _decode(self, layer: int, query: Tensor) -> Tensor:
        """[S, H, D] -> [S, H, D]: one product a KV head serves all its query heads."""
        assert self._cache is not None and self._decodes is not None
        sequences, heads, head_dim = query.shape
        keys = self._gathered(self._cache.keys[layer])
        values = self._gathered(self._cache.values[layer])
        grouped = query.view(sequences, keys.shape[1], -1, head_dim)  # [S, G, Q, D]
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._decodes.seen)
        return attended.view(sequences, heads, head_dim)

    def _gathered(self, memory: Tensor) -> Tensor:
        """The decoding sequences' keys or values of one layer, [S, G, L, D], zero where nothing is seen.

        Slots that nobody has written yet may hold anything, and 0 times NaN would still be NaN.
        """
        assert self._decodes is not None
        gathered = memory[self._decodes.blocks].flatten(1, 2)  # [S, L, G, D]
        return gathered.masked_fill_(self._decodes.unseen, 0).transpose(1, 2)

    def _prompt(self, layer: int, prompt: _Prompt, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, H, D] of one sequence, attending to what is cached before it and to itself."""
        if self._cache is not None and prompt.length > prompt.count:
            key = self._cache.keys[layer][prompt.blocks].flatten(0, 1)[: prompt.length]
            value = self._cache.values[layer][prompt.blocks].flatten(0, 1)[: prompt.length]
        plain = prompt.length == prompt.count and (self._window is None or prompt.length <= self._window)
        mask = None if plain else visible(prompt.count, prompt.length, self._window, query.device)
        repeats = query.shape[1] // key.shape[1]
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.repeat_interleave(repeats, dim=1).transpose(0, 1).unsqueeze(0),
            value.repeat_interleave(repeats, dim=1).transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=plain,
        )
        return attended.squeeze(0).transpose(0, 1)


@dataclass(frozen=True)
class _Prompt:
    """A sequence with several queries: where they lie, how long its context is, and its blocks."""

    start: int
    count: int
    length: int
    blocks: Tensor


@dataclass(frozen=True)
class _Decodes:
    """The sequences with one query: where it lies, their blocks, and which slots of those they see."""

    rows: Tensor  # [S]
    blocks: Tensor  # [S, W]
    seen: Tensor  # [S, 1, 1, L] of bool
    unseen: Tensor  # [S, L, 1, 1]
