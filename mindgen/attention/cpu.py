"""Attention for CPUs: the query heads of a KV head are the rows of one product, and nothing is copied that can be read
where it lies.

Sequences with one query (decodes) run together; prompts run one by one. Contexts are cut at the longest one, and a
mask is added only where sequences differ. Float32 is computed in float64 and rounded at the end: sums are made in other
orders for other batches, and a sequence must get the same in all of them.
T tokens, S decoding sequences, N queries of a prompt, L longest context, G KV heads, Q query heads a KV head,
D head_dim, W blocks a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mindgen.attention.reference import visible
from mindgen.attention.scores import Scores, attend

_ROWS = 32  # queries at a time: their scores stay in the cache, and little is computed that the mask throws away
_MANY = 4  # from so many sequences on, separate products are faster than SDPA (8 of 160 tokens: by a quarter)

_Way = Callable[[Tensor, Tensor, Tensor, Scores, "Tensor | None"], Tensor]

if TYPE_CHECKING:
    from mindgen.engine.batch import Batch
    from mindgen.engine.kv_cache import KVCache


class CpuAttention:
    """See AttentionBackend."""

    name = "cpu"

    def __init__(self, scores: Scores):
        self.scores = scores

    def prepare(self, batch: Batch, cache: KVCache | None) -> CpuContext:
        return CpuContext(batch, cache, self.scores)


class CpuContext:
    """See AttentionContext. What all layers share (masks, where blocks lie) is made once."""

    def __init__(self, batch: Batch, cache: KVCache | None, scores: Scores):
        self._cache, self._scores = cache, scores
        self.positions, self.is_long = batch.positions, batch.is_long
        self._slots = batch.slots
        starts, lengths = batch.query_starts.tolist(), batch.context_lens.tolist()
        counts = [stop - start for start, stop in pairwise(starts)]
        single = [index for index, count in enumerate(counts) if count == 1 and cache is not None]
        self._decodes = _decodes(batch, cache, single, starts, lengths) if cache and single else None
        self._biases: dict[int | None, Tensor | None] = {}  # for each window, what decodes add to their scores
        self._only_decodes = len(single) == len(counts)
        self._prompts = [
            _Prompt(starts[index], count, lengths[index], _past(batch, cache, index, lengths[index], count))
            for index, count in enumerate(counts)
            if count > 1 or cache is None
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query.flatten(1, -2)
        if self._cache is not None:
            key, value = _finite(key), _finite(value)
            self._cache.write(layer, self._slots, key, value)
        if self._decodes is not None and self._only_decodes:
            return self._decode(layer, self._decodes, query)
        output = torch.empty_like(query)
        if self._decodes is not None:
            output[self._decodes.rows] = self._decode(layer, self._decodes, query[self._decodes.rows])
        for prompt in self._prompts:
            rows = slice(prompt.start, prompt.start + prompt.count)
            output[rows] = self._prompt(layer, prompt, query[rows], key[rows], value[rows])
        return output

    def _decode(self, layer: int, decodes: _Decodes, query: Tensor) -> Tensor:
        """[S, H, D] -> [S, H, D]: one product a KV head serves all its query heads."""
        assert self._cache is not None
        keys = decodes.blocks.of(self._cache.keys[layer])[:, :, : decodes.longest]  # [G, S, L, D]
        values = decodes.blocks.of(self._cache.values[layer])[:, :, : decodes.longest]
        grouped = query.unflatten(1, (len(keys), -1)).transpose(0, 1)  # [G, S, Q, D]
        window, scores = self._scores.windows[layer], self._scores
        if window not in self._biases:
            self._biases[window] = _decode_bias(decodes, scores, window, len(keys))
        way = _fused if len(query) < _MANY and scores.softcap is None else _in_products
        if query.dtype == torch.float32:
            way = partial(_head_by_head, way)
        attended = way(grouped, keys, values, scores, self._biases[window])
        return attended.transpose(0, 1).reshape(query.shape)

    def _prompt(self, layer: int, prompt: _Prompt, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, H, D] of one sequence, attending to what is cached before it and to itself."""
        keys, values = key.transpose(0, 1), value.transpose(0, 1)  # [G, N, D]
        if self._cache is not None and prompt.blocks is not None:
            keys = prompt.blocks.of(self._cache.keys[layer])[:, 0, : prompt.length]
            values = prompt.blocks.of(self._cache.values[layer])[:, 0, : prompt.length]
        grouped = _exact(query).view(prompt.count, len(keys), -1, query.shape[2])  # [N, G, Q, D]
        return _causal(grouped, _exact(keys), _exact(values), self._scores, self._scores.windows[layer]).flatten(1, 2)


def _head_by_head(
    way: _Way, query: Tensor, keys: Tensor, values: Tensor, scores: Scores, bias: Tensor | None
) -> Tensor:
    """One of the ways below in float64, of which no more than one KV head's context is in memory."""
    output = torch.empty(query.shape)
    for head, result in enumerate(output.split(1)):
        own = slice(head, head + 1)
        added = bias if bias is None or bias.dim() == 3 else bias[own]
        result.copy_(way(_exact(query[own]), _exact(keys[own]), _exact(values[own]), scores, added))
    return output


def _fused(query: Tensor, keys: Tensor, values: Tensor, scores: Scores, bias: Tensor | None) -> Tensor:
    """query [G, S, Q, D], keys and values [G, S, L, D], bias [S, 1, L] or [G, S, Q, L] -> [G, S, Q, D]."""
    return attend(query, keys, values, scores, None if bias is None else bias.to(query.dtype))


def _in_products(query: Tensor, keys: Tensor, values: Tensor, scores: Scores, bias: Tensor | None) -> Tensor:
    """The same with float32 scores, as SDPA has them: those of bfloat16 would be rounded before they are scaled."""
    products = scores.capped(torch.matmul(_wide(query) * scores.scale, _wide(keys).transpose(-1, -2)))
    weights = (products if bias is None else products.add_(bias)).softmax(-1)
    return torch.matmul(weights.to(values.dtype), values)


def _causal(query: Tensor, keys: Tensor, values: Tensor, scores: Scores, window: int | None) -> Tensor:
    """query [N, G, Q, D] at the end of a context, keys and values [G, L, D] -> [N, G, Q, D].

    A few queries at a time, against those keys that one of them sees. Scores are float32, so that they are rounded
    after they are scaled and not before.
    """
    count, heads, shared, head_dim = query.shape
    length = keys.shape[1]
    wide, values = _wide(keys).contiguous(), values.contiguous()
    output = torch.empty_like(query)
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        end = length - count + stop
        first = 0 if window is None else max(0, end - (stop - start) - window + 1)
        rows = (_wide(query[start:stop].transpose(0, 1)) * scores.scale).flatten(1, 2)  # [G, n * Q, D]
        products = scores.capped(torch.bmm(rows, wide[:, first:end].transpose(1, 2)))
        products = products.view(heads, stop - start, shared, -1)
        bias = scores.bias(torch.arange(end - (stop - start), end), torch.arange(first, end))  # [n, H, L]
        if bias is not None:
            products += bias.unflatten(1, (heads, shared)).transpose(0, 1)
        unsure = end - first if window is not None else stop - start  # keys that not all of these queries see
        seen = visible(stop - start, end - first, window, query.device)[:, -unsure:]
        products[..., -unsure:] += _hidden(seen).unsqueeze(1)
        weights = products.softmax(-1).to(values.dtype).flatten(1, 2)
        attended = torch.bmm(weights, values[:, first:end])  # [G, n * Q, D]
        output[start:stop] = attended.view(heads, stop - start, shared, head_dim).transpose(0, 1)
    return output


def _exact(tensor: Tensor) -> Tensor:
    """Float32 as float64, others as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    return tensor.to(torch.float64, memory_format=torch.contiguous_format)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Blocks:
    """Where the contexts of some sequences lie. table: [S, W] block numbers."""

    def __init__(self, table: Tensor):
        self._sequences, self._width = table.shape
        self._numbers = table.flatten()
        numbers = self._numbers.tolist()
        is_run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        self._run = slice(numbers[0], numbers[0] + len(numbers)) if is_run else None

    def of(self, memory: Tensor) -> Tensor:
        """[num_blocks, block_size, G, D] of the cache -> [G, S, W * block_size, D]: a view of a run."""
        planes = memory.permute(2, 0, 1, 3)
        taken = planes.index_select(1, self._numbers) if self._run is None else planes[:, self._run]
        heads, _, block_size, head_dim = taken.shape
        return taken.view(heads, self._sequences, self._width * block_size, head_dim)


@dataclass(frozen=True)
class _Prompt:
    """A sequence with several queries: where they lie, how long its context is, and the blocks if it began earlier."""

    start: int
    count: int
    length: int
    blocks: _Blocks | None


@dataclass(frozen=True)
class _Decodes:
    """The sequences with one query: where it lies, their blocks, and how much of those is theirs."""

    rows: Tensor  # [S]
    blocks: _Blocks
    longest: int
    context: Tensor  # [S, 1] tokens


def _past(batch: Batch, cache: KVCache | None, index: int, length: int, count: int) -> _Blocks | None:
    if cache is None or length == count:
        return None
    return _Blocks(batch.block_tables[index : index + 1, : -(-length // cache.block_size)])


def _decodes(batch: Batch, cache: KVCache, single: list[int], starts: list[int], lengths: list[int]) -> _Decodes:
    longest = max(lengths[index] for index in single)
    width = -(-longest // cache.block_size)
    context = batch.context_lens[single].unsqueeze(1)  # [S, 1]
    table = batch.block_tables[single, :width]
    # Behind its end a sequence reads its own first block: numbers of others could be anything, and 0 times NaN is NaN.
    table = torch.where(torch.arange(width) * cache.block_size < context, table, table[:, :1])
    return _Decodes(torch.tensor([starts[index] for index in single]), _Blocks(table), longest, context)


def _decode_bias(decodes: _Decodes, scores: Scores, window: int | None, heads: int) -> Tensor | None:
    """What decodes add to their scores, float32: [S, 1, L], with ALiBi [G, S, Q, L]; None if all see all."""
    columns = torch.arange(decodes.longest)
    seen = columns < decodes.context
    if window is not None:
        seen &= columns >= decodes.context - window
    alibi = scores.bias(decodes.context.squeeze(1) - 1, columns)  # [S, H, L]
    if alibi is not None:
        return (alibi + _hidden(seen).unsqueeze(1)).unflatten(1, (heads, -1)).transpose(0, 1)
    return None if bool(seen.all()) else _hidden(seen).unsqueeze(1)


def _hidden(seen: Tensor) -> Tensor:
    """What is added to scores: 0 where `seen`, else minus infinity; float32. Five times as fast as filling in."""
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _finite(tensor: Tensor) -> Tensor:
    """Without NaN and infinity: what one sequence leaves in a block must not reach its next owner through a mask."""
    return tensor.nan_to_num(0.0, 0.0, 0.0)
