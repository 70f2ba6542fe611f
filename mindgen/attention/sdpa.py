"""Flash attention through torch's scaled_dot_product_attention, on every device that torch has it for.

Sequences with one query (decodes) run together as one grouped product; prompts run one by one without a mask.
T tokens, N queries and L context tokens of a prompt, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mindgen.attention.decodes import DecodeContext, DecodeRows, Decodes
from mindgen.attention.reference import visible
from mindgen.attention.scores import Scores, attend

if TYPE_CHECKING:
    from mindgen.engine.batch import Batch
    from mindgen.engine.kv_cache import KVCache


class SdpaAttention:
    """See AttentionBackend."""

    name = "sdpa"

    def __init__(self, scores: Scores):
        self.scores = scores

    def prepare(self, batch: Batch, cache: KVCache | None) -> SdpaContext:
        return SdpaContext(batch, cache, self.scores)

    def prepare_decodes(self, rows: DecodeRows, cache: KVCache) -> DecodeContext:
        """The same for a step of decodes whose tensors lie on the cache's device."""
        return DecodeContext(rows, cache, self.scores)


class SdpaContext:
    """See AttentionContext. What all layers share (masks, block indices) is made once."""

    def __init__(self, batch: Batch, cache: KVCache | None, scores: Scores):
        self._cache, self._scores = cache, scores
        self._device = torch.device("cpu") if cache is None else cache.keys[0].device
        self.positions, self.is_long = batch.positions.to(self._device), batch.is_long
        self._slots = batch.slots.to(self._device)
        starts, lengths = batch.query_starts.tolist(), batch.context_lens.tolist()
        counts = [stop - start for start, stop in pairwise(starts)]
        single = [index for index, count in enumerate(counts) if count == 1 and cache is not None]
        self._prompts = [
            _Prompt(starts[index], counts[index], lengths[index], self._blocks(batch, index, lengths[index]))
            for index in range(len(counts))
            if counts[index] > 1 or cache is None
        ]
        self._decodes = self._decoding(batch, single, lengths) if single else None
        self._decoded = torch.tensor([starts[index] for index in single], dtype=torch.int64, device=self._device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query.flatten(1, -2)
        if self._cache is not None:
            self._cache.write(layer, self._slots, key, value)
        output = torch.empty_like(query)
        if self._decodes is not None:
            output[self._decoded] = self._decodes.attend(layer, query[self._decoded])
        for prompt in self._prompts:
            rows = slice(prompt.start, prompt.start + prompt.count)
            output[rows] = self._prompt(layer, prompt, query[rows], key[rows], value[rows])
        return output

    def _blocks(self, batch: Batch, index: int, length: int) -> Tensor:
        if self._cache is None:
            return torch.empty(0, dtype=torch.int64)
        return batch.block_tables[index, : -(-length // self._cache.block_size)].to(self._device)

    def _decoding(self, batch: Batch, single: list[int], lengths: list[int]) -> Decodes:
        assert self._cache is not None
        width = -(-max(lengths[index] for index in single) // self._cache.block_size)
        blocks, context = batch.block_tables[single, :width], batch.context_lens[single]
        return Decodes(blocks.to(self._device), context.to(self._device), self._cache, self._scores)

    def _prompt(self, layer: int, prompt: _Prompt, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, H, D] of one sequence, attending to what is cached before it and to itself."""
        if self._cache is not None and prompt.length > prompt.count:
            key = self._cache.keys[layer][prompt.blocks].flatten(0, 1)[: prompt.length]
            value = self._cache.values[layer][prompt.blocks].flatten(0, 1)[: prompt.length]
        repeats = query.shape[1] // key.shape[1]
        mask = self._prompt_mask(prompt, self._scores.windows[layer], query)
        attended = attend(
            query.transpose(0, 1).unsqueeze(0),
            key.repeat_interleave(repeats, dim=1).transpose(0, 1).unsqueeze(0),
            value.repeat_interleave(repeats, dim=1).transpose(0, 1).unsqueeze(0),
            self._scores,
            mask,
            causal=mask is None,
        )
        return attended.squeeze(0).transpose(0, 1)

    def _prompt_mask(self, prompt: _Prompt, window: int | None, query: Tensor) -> Tensor | None:
        """Which keys each query of a prompt sees, [N, L] of bool, or with ALiBi what is added, [H, N, L].

        None if each sees all before it: kernels are faster without a mask.
        """
        plain = prompt.length == prompt.count and (window is None or prompt.length <= window)
        if plain and self._scores.softcap is None and self._scores.slopes is None:
            return None
        seen = visible(prompt.count, prompt.length, window, query.device)
        context = torch.arange(prompt.length, device=query.device)
        bias = self._scores.bias(context[-prompt.count :], context)  # [N, H, L]
        if bias is None:
            return seen
        return bias.transpose(0, 1).masked_fill(~seen, float("-inf")).to(query.dtype)


@dataclass(frozen=True)
class _Prompt:
    """A sequence with several queries: where they lie, how long its context is, and its blocks."""

    start: int
    count: int
    length: int
    blocks: Tensor
