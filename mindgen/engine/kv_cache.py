"""The memory behind the blocks: keys and values of every layer of one stage, on one rank.

Legend: T tokens, H KV heads on this rank, D head_dim. A slot is one token's place: block * block_size + offset.
"""

from __future__ import annotations

from math import prod

import numpy
import torch
from torch import Tensor


class KVCache:
    """Keys and values, one tensor a layer, each [num_blocks, block_size, H, D].

    On CPU they are views of memory [H, num_blocks, block_size, D], so that the keys of one head in neighbouring blocks
    are one matrix, and memory is taken from the system only as it is written. The cache starts as zeros, so that a
    kernel which reads a whole block and masks afterwards meets no NaN.
    has_spare: one more block for what nobody reads; `spare_block` is its number, None without it.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        has_spare: bool = False,
    ) -> None:
        sizes = (num_blocks + has_spare, block_size, num_kv_heads, head_dim)
        self.num_blocks = num_blocks
        self.spare_block = num_blocks if has_spare else None
        self.block_size = block_size
        self.device = torch.device(device)
        self.keys = [_zeros(sizes, dtype, self.device) for _ in range(num_layers)]
        self.values = [_zeros(sizes, dtype, self.device) for _ in range(num_layers)]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` [T, H, D] at `slots` [T] (int64) of one layer."""
        slots = slots.to(self.device, non_blocking=True)
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def copy(self, pairs: Tensor) -> None:
        """Copy whole blocks in every layer; `pairs` [C, 2] (int64) holds source and destination.

        No destination may be the source or the destination of another pair.
        """
        if not len(pairs):
            return
        sources, destinations = pairs.to(self.device).unbind(1)
        for memory in (*self.keys, *self.values):
            memory.index_copy_(0, destinations, memory.index_select(0, sources))


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """The bytes that one block takes on one rank, keys and values of all its layers together."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


def _zeros(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(sizes, dtype=dtype, device=device)
    num_blocks, block_size, num_kv_heads, head_dim = sizes
    pages = numpy.zeros(prod(sizes) * dtype.itemsize, dtype=numpy.uint8)  # torch.zeros would write them all now
    planes = torch.from_numpy(pages).view(dtype).view(num_kv_heads, num_blocks, block_size, head_dim)
    return planes.permute(1, 2, 0, 3)
