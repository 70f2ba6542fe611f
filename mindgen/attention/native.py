"""Attention by the compiled kernel (kernels/cpu/attention.cpp): one call a layer for decodes, chunks and prompts
together, over the cache where it lies.

T tokens, S sequences, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from ctypes import addressof
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mindgen.attention.cpu import CpuAttention, CpuContext
from mindgen.attention.scores import Scores
from mindgen.kernels.layer import AttentionHalf
from mindgen.kernels.library import kernel
from mindgen.kernels.structures import Context, filled

if TYPE_CHECKING:
    from mindgen.engine.batch import Batch
    from mindgen.engine.kv_cache import KVCache
    from mindgen.layers.rope import Rotation

_MOST_HEAD_DIM = 256


class NativeAttention:
    """See AttentionBackend. bfloat16 on CPUs that have products of it."""

    name = "native"

    def __init__(self, scores: Scores):
        self.scores = scores

    def prepare(self, batch: Batch, cache: KVCache | None) -> NativeContext | CpuContext:
        """Without a cache, and for heads that the kernel has no room for, that of `cpu`."""
        if cache is None or not _fits(cache.keys[0].shape[3]):
            return CpuAttention(self.scores).prepare(batch, cache)
        return NativeContext(batch, cache, self.scores)


class NativeContext:
    """See AttentionContext."""

    def __init__(self, batch: Batch, cache: KVCache, scores: Scores):
        self.positions, self.is_long = batch.positions, batch.is_long
        self._cache, self._windows = cache, scores.windows
        self._sizes = (len(batch.slots), *cache.keys[0].shape[2:])
        self._kernel = kernel("attend")
        self._same, self._tensors = _same_for_all_layers(batch, cache, scores)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, groups, head_dim = key.shape
        if query.dim() == 3:
            query = query.unflatten(1, (groups, -1))
        assert query.dtype is key.dtype is value.dtype is torch.bfloat16
        assert key.shape == value.shape == self._sizes and query.shape[:2] == key.shape[:2]
        assert query.shape[3] == head_dim
        query, key, value = _dense(query), _dense(key), _dense(value)
        shared = query.shape[2]
        output = query.new_empty(tokens, groups * shared, head_dim)
        # fmt: off
        self._kernel(
            query.data_ptr(), *query.stride()[:3], key.data_ptr(), *key.stride()[:2], value.data_ptr(),
            *value.stride()[:2], self._cache.keys[layer].data_ptr(), self._cache.values[layer].data_ptr(),
            output.data_ptr(), shared, self._windows[layer] or 0, addressof(self._same),
        )
        # fmt: on
        return output

    def attend_half(
        self, layer: int, half: AttentionHalf, hidden: Tensor, rotation: Rotation | None, residual: Tensor | None
    ) -> Tensor:
        """`attend` with all that stands before and behind it: hidden states [T, H] -> [T, H], plus `residual`."""
        assert (len(hidden), *half.heads) == self._sizes
        turns = None if rotation is None else (rotation.cosine, rotation.sine, rotation.interleaved)
        memory = self._cache.keys[layer], self._cache.values[layer]
        return half(hidden, residual, turns, self._same, memory, self._windows[layer] or 0)


def _fits(head_dim: int) -> bool:
    return head_dim % 2 == 0 and head_dim <= _MOST_HEAD_DIM


def _dense(heads: Tensor) -> Tensor:
    """With the numbers of a head side by side."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _same_for_all_layers(batch: Batch, cache: KVCache, scores: Scores) -> tuple[Context, dict[str, Tensor | None]]:
    """What the kernel is told once a step, and the tensors that must live as long."""
    tables, slopes, memory = batch.block_tables.contiguous(), scores.slopes, cache.keys[0]
    whole = {"slots": batch.slots, "starts": batch.query_starts, "lengths": batch.context_lens, "tables": tables}
    assert all(tensor.dtype is torch.int64 for tensor in whole.values())
    assert memory.stride() == cache.values[0].stride() and memory.shape == cache.values[0].shape
    assert memory.dtype is cache.values[0].dtype is torch.bfloat16
    tensors = whole | {"slopes": None if slopes is None else slopes.contiguous()}
    cache_block, cache_token, cache_group, _ = memory.stride()
    _, block_size, groups, head_dim = memory.shape
    sequences, width = tables.shape
    same = filled(
        Context, tensors, width=width, sequences=sequences, cache_block=cache_block, cache_token=cache_token,
        cache_group=cache_group, block_size=block_size, groups=groups, head_dim=head_dim,
        threads=torch.get_num_threads(), scale=scores.scale, softcap=scores.softcap or 0.0,
    )  # fmt: skip
    return same, tensors
