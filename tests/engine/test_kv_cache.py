"""The memory behind the blocks."""

from __future__ import annotations

import psutil
import pytest
import torch

from mindgen.engine.kv_cache import KVCache, block_bytes


def filled(dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(2, num_blocks=5, block_size=3, num_kv_heads=2, head_dim=4, dtype=dtype, device="cpu")
    for number, memory in enumerate([*cache.keys, *cache.values]):
        memory.copy_(torch.arange(memory.numel()).view(memory.shape) % 97 + 100 * number)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_written_to_their_slots_of_one_layer(dtype):
    cache = KVCache(2, num_blocks=4, block_size=3, num_kv_heads=2, head_dim=4, dtype=dtype, device="cpu")
    keys, values = torch.randn(2, 3, 2, 4).to(dtype)
    cache.write(1, torch.tensor([7, 0, 11]), keys, values)
    assert torch.equal(cache.keys[1][2, 1], keys[0]) and torch.equal(cache.values[1][2, 1], values[0])
    assert torch.equal(cache.keys[1][0, 0], keys[1]) and torch.equal(cache.keys[1][3, 2], keys[2])
    assert int(cache.keys[1].count_nonzero()) == 3 * 8 and not cache.keys[0].any() and not cache.values[0].any()


def test_blocks_are_copied_in_every_layer_and_others_stay():
    cache, before = filled(), filled()
    cache.copy(torch.tensor([[1, 4], [1, 0], [3, 2]]))
    for after, old in zip([*cache.keys, *cache.values], [*before.keys, *before.values], strict=True):
        assert torch.equal(after, old[[1, 1, 3, 3, 1]])


def test_no_pairs_copy_nothing():
    cache = filled()
    cache.copy(torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(cache.keys[0], filled().keys[0])


def test_block_bytes_are_what_a_block_takes():
    cache = filled(torch.bfloat16)
    memory = sum(part.numel() * part.element_size() for part in [*cache.keys, *cache.values])
    assert memory == 5 * block_bytes(2, block_size=3, num_kv_heads=2, head_dim=4, dtype=torch.bfloat16)


def test_a_large_cache_costs_nothing_before_it_is_used():
    before = psutil.Process().memory_info().rss
    cache = KVCache(1, num_blocks=1024, block_size=128, num_kv_heads=8, head_dim=128, dtype=torch.float16, device="cpu")
    assert cache.keys[0].numel() * 2 == 1 << 28
    assert psutil.Process().memory_info().rss - before < 1 << 26
