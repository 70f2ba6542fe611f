"""Every backend against the reference: decodes, prompts, chunks and their mixture, with and without a window."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindgen.attention.backend import BACKENDS, choose_backend
from mindgen.attention.scores import Scores, alibi_slopes
from mindgen.engine.kv_cache import KVCache
from mindgen.kernels import library
from tests.attention.paged import Mix, Shape, make_batch, make_inputs, needs_kernels

SHAPE = Shape()
HEADS, KV_HEADS, HEAD_DIM, BLOCK = SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.block
EXACT = [name for name in BACKENDS if name != "native"]  # those that compute in float32 too
EVERY = [*EXACT, pytest.param("native", marks=needs_kernels)]
BF16, CPU = torch.bfloat16, torch.device("cpu")
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


def attend(name: str, mix: Mix, scores: Scores = PLAIN, cached: bool = True) -> torch.Tensor:
    return make_inputs(mix).attend(name, scores, cached=cached)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("name", [name for name in EXACT if name != "reference"])
def test_matches_the_reference(name: str, mix: str, kind: str) -> None:
    torch.testing.assert_close(attend(name, MIXES[mix], KINDS[kind]), attend("reference", MIXES[mix], KINDS[kind]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_every_kind_of_scores_makes_a_difference(kind: str) -> None:
    assert (attend("reference", MIXES["mixed"], KINDS[kind]) - attend("reference", MIXES["mixed"])).abs().max() > 1e-2


@pytest.mark.parametrize("name", EXACT)
def test_a_sequence_gets_the_same_in_a_crowd_as_alone(name: str) -> None:
    crowd = attend(name, [(5, 5), (1, 6)])
    torch.testing.assert_close(crowd[:5], attend(name, [(5, 5)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("others", [[], [(1, 2), (1, 37), (5, 9), (1, 30)]])
@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("kind", list(KINDS))
def test_on_a_cpu_float32_has_the_same_bits_in_any_batch_and_chunks(kind: str, size: int, others: Mix) -> None:
    length = 36
    query, key, value = torch.randn(3, 2 * length, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    key, value = key[:, :KV_HEADS], value[:, :KV_HEADS]

    def answers(count: int, others: Mix) -> torch.Tensor:
        """Of a prompt, `count` tokens a step, each step among others."""
        cache, parts = KVCache(1, 40, BLOCK, KV_HEADS, HEAD_DIM, torch.float32, "cpu"), []
        for start in range(0, length, count):
            batch = make_batch([(count, start + count), *others])
            tokens = torch.cat([torch.arange(start, start + count), length + torch.arange(sum(n for n, _ in others))])
            context = choose_backend("cpu", KINDS[kind]).prepare(batch, cache)
            parts.append(context.attend(0, query[tokens], key[tokens], value[tokens])[:count])
        return torch.cat(parts)

    assert torch.equal(answers(size, others), answers(length, []))


@pytest.mark.parametrize("name", EXACT)
def test_without_a_cache_it_sees_the_batch_alone(name: str) -> None:
    prompts = MIXES["prompts"]
    torch.testing.assert_close(attend(name, prompts, cached=False), attend("reference", prompts))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", EVERY)
def test_what_a_broken_sequence_leaves_behind_reaches_no_other(name: str, broken: float) -> None:
    """A sequence fills a block with it; then another one owns the block, and has written less."""
    dtype = BF16 if name == "native" else torch.float32
    cache = KVCache(1, 40, BLOCK, KV_HEADS, HEAD_DIM, dtype, "cpu")
    for mix, number in (([(BLOCK, BLOCK)], broken), ([(1, 1), (1, 3 * BLOCK)] * 3, 1.0)):
        batch = make_batch(mix)
        tokens = torch.full((int(batch.query_starts[-1]), KV_HEADS, HEAD_DIM), number, dtype=dtype)
        query = torch.ones(len(tokens), HEADS, HEAD_DIM, dtype=dtype)
        output = choose_backend(name, PLAIN, dtype=dtype).prepare(batch, cache).attend(0, query, tokens, tokens)
    assert output.isfinite().all()


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="'cpu' cannot run: .*the model is on cuda; choose one of auto, sdpa, ref"):
        choose_backend("cpu", PLAIN, torch.device("cuda"))
    with pytest.raises(ValueError, match="'native' cannot run: .*the model is on cuda; choose one of auto, sdpa, ref"):
        choose_backend("native", PLAIN, torch.device("cuda"), BF16)
    with pytest.raises(
        ValueError, match="'native' cannot run: .*bfloat16, and the model in float32; .* auto, cpu, sdpa"
    ):
        choose_backend("native", PLAIN)


def test_auto_takes_the_first_that_can_run() -> None:
    assert choose_backend("auto", PLAIN, torch.device("cuda"), BF16).name == "sdpa"
    assert choose_backend("auto", PLAIN, CPU).name == "cpu"
    assert choose_backend("auto", PLAIN, CPU, BF16).name == ("cpu" if library.unavailable() else "native")


def test_the_reference_is_softmax_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 1, HEAD_DIM)
    batch = SimpleNamespace(
        positions=torch.arange(4),
        is_long=torch.arange(0),
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
    with pytest.raises(ValueError, match="'flsh'; choose one of auto, native, cpu, sdpa, reference"):
        choose_backend("flsh", PLAIN)


@pytest.mark.parametrize("name", EVERY)
def test_large_keys_lose_no_precision_in_bfloat16(name: str) -> None:
    """Keys with a common offset, as large biases give them: scores must not be rounded before they are scaled."""
    inputs = make_inputs(MIXES["decodes"])
    far = replace(inputs, query=inputs.query + 10, key=inputs.key + 10, keys=inputs.keys + 10).rounded()
    exact = far.attend("reference", PLAIN)
    assert (far.attend(name, PLAIN, BF16).float() - exact).abs().max() < 0.05
