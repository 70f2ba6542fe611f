"""Every backend against the reference: decodes, prompts, chunks and their mixture, with and without a window."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindgen.attention.backend import BACKENDS, choose_backend
from mindgen.attention.scores import Scores, alibi_slopes
from mindgen.engine.kv_cache import KVCache

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 8, 4
# (queries of this step, tokens of context) of each sequence
MIXES = {
    "prompts": [(5, 5), (1, 1), (9, 9)],
    "decodes": [(1, 6), (1, 17), (1, 1), (1, 8)],
    "chunk": [(3, 11)],
    "long": [(38, 38)],  # longer than what a backend takes at a time
    "long chunk": [(36, 100)],
    "neighbours": [(1, 130)],
    "mixed": [(1, 9), (7, 7), (4, 10), (1, 3)],
}


def scores_of(window: int | None, **more: Any) -> Scores:
    return Scores(HEAD_DIM**-0.5, (window,), **more)


PLAIN = scores_of(None)
KINDS = {
    "plain": PLAIN,
    "window": scores_of(3),
    "soft cap": scores_of(None, softcap=0.8),
    "soft cap, window": scores_of(3, softcap=0.8),
    "ALiBi": scores_of(None, slopes=alibi_slopes(HEADS)),
    "scale": Scores(0.9, (None,)),
}


def make_cache(seed: int) -> KVCache:
    cache = KVCache(1, 40, BLOCK, KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for memory in cache.keys + cache.values:
        memory.copy_(torch.randn(memory.shape, generator=generator))
        memory[0] = float("nan")  # a block that nobody owns
    return cache


def make_batch(mix: list[tuple[int, int]]) -> Any:
    """Sequences on scattered blocks of their own, tables filled up with block 0."""
    free = torch.randperm(39, generator=torch.Generator().manual_seed(1)).add(1).tolist()
    tables = [[free.pop() for _ in range(-(-length // BLOCK))] for _, length in mix]
    width = max(map(len, tables))
    positions = [range(length - count, length) for count, length in mix]
    slots = [
        table[p // BLOCK] * BLOCK + p % BLOCK for table, places in zip(tables, positions, strict=True) for p in places
    ]
    starts = torch.tensor([0] + [count for count, _ in mix]).cumsum(0)
    return SimpleNamespace(
        positions=torch.tensor([p for places in positions for p in places]),
        slots=torch.tensor(slots),
        query_starts=starts,
        context_lens=torch.tensor([length for _, length in mix]),
        block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
    )


def attend(name: str, mix: list[tuple[int, int]], scores: Scores = PLAIN, cached: bool = True) -> torch.Tensor:
    batch = make_batch(mix)
    generator = torch.Generator().manual_seed(2)
    tokens = int(batch.query_starts[-1])
    query = torch.randn(40, HEADS, HEAD_DIM, generator=generator)[:tokens]
    key, value = torch.randn(2, 40, KV_HEADS, HEAD_DIM, generator=generator)[:, :tokens]
    context = choose_backend(name, scores).prepare(batch, make_cache(0) if cached else None)
    return context.attend(0, query, key, value)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_matches_the_reference(name: str, mix: str, kind: str) -> None:
    torch.testing.assert_close(attend(name, MIXES[mix], KINDS[kind]), attend("reference", MIXES[mix], KINDS[kind]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_every_kind_of_scores_makes_a_difference(kind: str) -> None:
    assert (attend("reference", MIXES["mixed"], KINDS[kind]) - attend("reference", MIXES["mixed"])).abs().max() > 1e-2


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sequence_gets_the_same_in_a_crowd_as_alone(name: str) -> None:
    crowd = attend(name, [(5, 5), (1, 6)])
    torch.testing.assert_close(crowd[:5], attend(name, [(5, 5)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_without_a_cache_it_sees_the_batch_alone(name: str) -> None:
    prompts = MIXES["prompts"]
    torch.testing.assert_close(attend(name, prompts, cached=False), attend("reference", prompts))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_broken_sequence_leaves_behind_reaches_no_other(name: str, broken: float) -> None:
    """A sequence fills a block with it; then another one owns the block, and has written less."""
    cache = KVCache(1, 40, BLOCK, KV_HEADS, HEAD_DIM, torch.float32, "cpu")
    for mix, number in (([(BLOCK, BLOCK)], broken), ([(1, 1), (1, 3 * BLOCK)] * 3, 1.0)):
        batch = make_batch(mix)
        tokens = torch.full((int(batch.query_starts[-1]), KV_HEADS, HEAD_DIM), number)
        query = torch.ones(len(tokens), HEADS, HEAD_DIM)
        output = choose_backend(name, PLAIN).prepare(batch, cache).attend(0, query, tokens, tokens)
    assert output.isfinite().all()


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="'cpu' cannot run: .*the model is on cuda; choose one of auto, sdpa, ref"):
        choose_backend("cpu", PLAIN, torch.device("cuda"))
    assert choose_backend("auto", PLAIN, torch.device("cuda")).name == "sdpa"
    assert choose_backend("auto", PLAIN, torch.device("cpu")).name == "cpu"


def test_the_reference_is_softmax_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 1, HEAD_DIM)
    batch = SimpleNamespace(
        positions=torch.arange(4),
        slots=torch.arange(0),
        query_starts=torch.tensor([0, 4]),
        context_lens=torch.tensor([4]),
        block_tables=torch.empty(1, 0, dtype=torch.int64),
    )
    weights = torch.exp(query[:, 0] @ key[:, 0].T / HEAD_DIM**0.5).tril()
    expected = (weights / weights.sum(1, keepdim=True)) @ value[:, 0]
    ours = choose_backend("reference", PLAIN).prepare(batch, None).attend(0, query, key, value)  # type: ignore[arg-type]
    torch.testing.assert_close(ours[:, 0], expected)


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'flsh'; choose one of auto, cpu, sdpa, reference"):
        choose_backend("flsh", PLAIN)


@pytest.mark.parametrize("name", BACKENDS)
def test_large_keys_lose_no_precision_in_bfloat16(name: str) -> None:
    """Keys with a common offset, as large biases give them: scores must not be rounded before they are scaled."""
    batch, cache = make_batch(MIXES["decodes"]), make_cache(0)
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(4, HEADS, HEAD_DIM, generator=generator) + 10
    key, value = torch.randn(2, 4, KV_HEADS, HEAD_DIM, generator=generator)
    low = KVCache(1, 40, BLOCK, KV_HEADS, HEAD_DIM, torch.bfloat16, "cpu")
    for wide, narrow in zip(cache.keys + cache.values, low.keys + low.values, strict=True):
        narrow.copy_(wide + 10 if wide is cache.keys[0] else wide)
        wide.copy_(narrow)
    parts = [part.bfloat16() for part in (query, key + 10, value)]
    exact = choose_backend("reference", PLAIN).prepare(batch, cache).attend(0, *(part.float() for part in parts))
    ours = choose_backend(name, PLAIN).prepare(batch, low).attend(0, *parts)
    assert (ours.float() - exact).abs().max() < 0.05
