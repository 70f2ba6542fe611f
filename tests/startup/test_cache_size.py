"""How large the cache is: as asked, a share of what is free, and never more than the poorest rank can hold."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from mindgen.config import EngineConfig
from mindgen.startup import cache_size
from mindgen.startup.cache_size import cache_bytes, check_asked, num_blocks
from mindgen.startup.ready import describe

GIB = 2**30


def config(**options) -> EngineConfig:
    return EngineConfig("model", **options)


@pytest.mark.parametrize(
    ("options", "kind", "gib"),
    [
        ({}, "cpu", 0.3 * 80 / 4),
        ({}, "cuda", 0.9 * 80),
        ({}, "npu", 0.9 * 80),
        ({"kv_cache_fraction": 0.5}, "cpu", 0.5 * 80 / 4),
        ({"kv_cache_fraction": 0.5}, "cuda", 0.5 * 80),
        ({"kv_cache_memory": 1.5}, "cpu", 1.5),
        ({"kv_cache_memory": 1.5}, "cuda", 1.5),
    ],
)
def test_four_ranks_with_80_gib_free(options, kind, gib):
    assert cache_bytes(config(**options), kind, 80 * GIB, local_ranks=4) == pytest.approx(gib * GIB)


class Everyone:
    """A group whose other rank has room for `others` blocks."""

    def __init__(self, others: int) -> None:
        self.others = others

    def all_gather(self, mine: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([mine, torch.tensor([self.others])], dim)


def blocks(others: int, context: int = 4096, **options) -> int:
    """A block of 128 tokens takes 2 MiB: 4 layers, 8 heads of 128 elements, keys and values in bf16."""
    device = torch.device("cpu")
    model = SimpleNamespace(num_layers=4, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=device)
    world, spec = SimpleNamespace(everyone=Everyone(others)), SimpleNamespace(max_positions=context)
    return num_blocks(config(**options), spec, model, world, local_ranks=2)


def test_every_rank_has_as_many_blocks_as_the_poorest():
    assert blocks(others=900, kv_cache_memory=1) == 512
    assert blocks(others=300, kv_cache_memory=1) == 300


def test_more_than_all_sequences_can_use_is_not_taken():
    assert blocks(others=10**6, kv_cache_memory=1, context=129) == 256 * 2


def test_a_cache_without_room_for_a_block_is_refused():
    with pytest.raises(ValueError, match=r"one cache block of 128 tokens, 2.0 MiB; raise kv_cache_memory \(--kv-cache"):
        blocks(others=0, kv_cache_memory=1)


@pytest.mark.parametrize(
    ("asked", "local_ranks", "kind", "message"),
    [
        (
            200,
            1,
            "cpu",
            r"kv_cache_memory \(--kv-cache-memory\) is 200 GiB, and this host has 24.00 GiB of memory free",
        ),
        (12.5, 2, "cpu", r"is 12.5 GiB on each of 2 ranks, and this host has 24.00 GiB"),
        (12, 2, "cpu", None),
        (200, 1, "cuda", None),
        (None, 1, "cpu", None),
    ],
)
def test_more_than_a_cpu_host_has_free_is_refused(monkeypatch, asked, local_ranks, kind, message):
    monkeypatch.setattr(cache_size, "free_memory", lambda device: 24 * GIB)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_asked(config(kv_cache_memory=asked), torch.device(kind), local_ranks)


@pytest.mark.parametrize(
    ("num_blocks", "asked", "note"),
    [(512, 4, True), (512, 1.0, False), (512, None, False), (300, 4, False)],
)
def test_the_cache_line_says_when_it_is_smaller_than_asked(num_blocks, asked, note):
    spec = SimpleNamespace(max_positions=129)
    model = SimpleNamespace(config=config(kv_cache_memory=asked), source=SimpleNamespace(spec=spec))
    half = [torch.empty(GIB // 1024 * num_blocks, dtype=torch.uint8, device="meta")]
    cache = SimpleNamespace(num_blocks=num_blocks, block_size=128, keys=half, values=half)
    (line,) = describe(model, SimpleNamespace(cache=cache))
    assert line.startswith(f"cache: {num_blocks} blocks of 128")
    assert ("; of 4 GiB no more can be used, by 256 sequences of 129 tokens" in line) == note


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kv_cache_fraction": 0.0}, r"\(--kv-cache-fraction\) is 0.0; it must be above 0 and at most 1"),
        ({"kv_cache_fraction": 1.5}, r"\(--kv-cache-fraction\) is 1.5; it must be above 0 and at most 1"),
        ({"kv_cache_fraction": float("nan")}, r"kv_cache_fraction \(--kv-cache-fraction\) is nan"),
        ({"kv_cache_fraction": 0.5, "kv_cache_memory": 1}, "both say how large the cache is"),
        ({"kv_cache_memory": 0}, r"kv_cache_memory \(--kv-cache-memory\) is 0"),
    ],
)
def test_sizes_that_make_no_sense_are_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        config(**options)
