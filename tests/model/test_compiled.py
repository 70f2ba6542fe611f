"""Halves of a layer in one call of the kernels: the bits that the modules give one by one, for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mindgen.attention.backend import choose_backend
from mindgen.attention.native import NativeContext
from mindgen.attention.scores import Scores
from mindgen.engine.kv_cache import KVCache
from mindgen.kernels.linear import sizes
from mindgen.layers.compiled import CompiledAttention, CompiledMLP
from mindgen.layers.linear import ColumnParallelLinear, RowParallelLinear
from mindgen.layers.mlp import MLP
from mindgen.model.build import build_stage
from mindgen.model.decoder import Decoder, DecoderLayer
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.topology import SINGLE, Topology
from mindgen.weights.huggingface import open_huggingface
from mindgen.weights.load import load_weights
from tests.attention.paged import Mix, Shape, make_batch, needs_kernels

pytestmark = needs_kernels

CPU, BF16 = torch.device("cpu"), torch.bfloat16
MIXES: dict[str, Mix] = {"decode": [(1, 9)], "mixed": [(1, 30), (7, 7), (5, 20), (1, 2)]}
# What is special: norms of queries and keys; biases and yarn; offsets, sandwich norms, caps and windows; heads that are
# turned in part; neighbours that are turned; slopes and no rotation; frequencies for long sequences.
WHOLE = ("llama31", "qwen3", "qwen2", "gemma2", "phi3", "glm4", "baichuan_13b", "phi35")


class Halves(SingleGroup):
    """A rank of two, the other of which always has the same."""

    size = 2

    def __init__(self, rank: int = 0):
        self.rank = rank

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        return tensor * 2


class Watched(NativeContext):
    """Notes the layers that attend, as half a layer or otherwise."""

    def __init__(self, batch: Any, cache: KVCache, scores: Scores):
        super().__init__(batch, cache, scores)
        self.halves: list[int] = []
        self.others: list[int] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.others.append(layer)
        return super().attend(layer, query, key, value)

    def attend_half(self, layer: int, *rest: Any) -> Tensor:
        self.halves.append(layer)
        return super().attend_half(layer, *rest)


def loaded(folder: Path, num_ranks: int = 1, rank: int = 0) -> Decoder:
    source = open_huggingface(folder)
    topology, group = (SINGLE, SingleGroup()) if num_ranks == 1 else (Topology(rank, num_ranks, 1), Halves(rank))
    model = build_stage(source.spec, topology, group, BF16, CPU)
    load_weights(model, source, topology)
    return model


class Step:
    """A step of some sequences: hidden states and a cache in which something is."""

    def __init__(self, model: Decoder, mix: Mix):
        self.batch = make_batch(mix, Shape(block=8, blocks=12))
        tokens = len(self.batch.positions)
        self.model, generator, size = model, torch.Generator().manual_seed(tokens), model.hidden_size
        self.hidden, self.residual = (torch.randn(tokens, size, generator=generator).to(BF16) for _ in range(2))
        self.rotation = None
        if model._rope is not None:
            if len(model._rope.frequencies) > 1:
                self.batch.is_long = self.batch.positions.remainder(2)
            self.rotation = model._rope(self.batch.positions, self.batch.is_long)
        shape = (model.num_layers, 12, 8, model.num_kv_heads, model.head_dim)
        self.memory = torch.randn(2, *shape, generator=generator).to(BF16)

    def context(self) -> tuple[Watched, KVCache]:
        """A context over a cache of its own."""
        cache = KVCache(*self.memory.shape[1:], BF16, CPU)
        for layer, (keys, values) in enumerate(zip(*self.memory, strict=True)):
            cache.keys[layer].copy_(keys)
            cache.values[layer].copy_(values)
        backend = choose_backend("native", self.model.scores, CPU, BF16)
        assert isinstance(backend.prepare(self.batch, cache), NativeContext)
        return Watched(self.batch, cache, backend.scores), cache

    def outputs(self, layer: DecoderLayer) -> tuple[Tensor, Tensor]:
        """What the halves of a layer give as it is now."""
        attention = CompiledAttention.of(layer.input_layernorm, layer.self_attention)
        feed_forward = CompiledMLP.of(layer.pre_mlp_layernorm, layer.mlp)
        assert attention is not None and feed_forward is not None
        attended = attention(self.hidden, self.rotation, self.context()[0], self.residual)
        return attended, feed_forward(self.hidden, self.residual)

    def check(self, layer: DecoderLayer, residual: Tensor | None) -> None:
        """Both halves of a layer."""
        attention = CompiledAttention.of(layer.input_layernorm, layer.self_attention)
        feed_forward = CompiledMLP.of(layer.pre_mlp_layernorm, layer.mlp)
        assert attention is not None and feed_forward is not None
        (context, cache), (plain, plain_cache) = self.context(), self.context()
        before = self.hidden.clone()
        attended = attention(self.hidden, self.rotation, context, residual)
        normed = layer.input_layernorm(self.hidden)
        assert torch.equal(attended, layer.self_attention(normed, self.rotation, plain, residual))
        number = layer.self_attention.layer
        assert torch.equal(cache.keys[number], plain_cache.keys[number])
        assert torch.equal(cache.values[number], plain_cache.values[number])
        fed = feed_forward(self.hidden, residual)
        assert torch.equal(fed, layer.mlp(layer.pre_mlp_layernorm(self.hidden), residual))
        assert torch.equal(self.hidden, before)


@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("name", WHOLE)
def test_a_layer_gives_the_bits_of_its_modules(name: str, mix: str, checkpoint: Callable[[str], Path]) -> None:
    model = loaded(checkpoint(name))
    step = Step(model, MIXES[mix])
    for layer in model._layers[:2]:
        step.check(layer, step.residual)
        step.check(layer, None)


@pytest.mark.parametrize("name", [*WHOLE, "mixtral", "gpt2"])
def test_a_layer_computes_by_halves_all_that_the_kernels_can(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = loaded(checkpoint(name))
    step = Step(model, MIXES["mixed"])
    for number, layer in enumerate(model._layers):
        (context, cache), (plain, plain_cache) = step.context(), step.context()
        outputs = layer(step.hidden, step.rotation, context)
        kinds = [half is not None for half in layer._compiled]
        assert kinds == [name != "gpt2", name not in ("gpt2", "mixtral")]
        assert (context.halves, context.others) == (([], [number]) if name == "gpt2" else ([number], []))
        layer._compiled = (None, None)
        assert torch.equal(outputs, layer(step.hidden, step.rotation, plain))
        assert torch.equal(cache.keys[number], plain_cache.keys[number])
        assert (plain.halves, plain.others) == ([], [number])


@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_biases_are_added_once(num_ranks: int, rank: int, checkpoint: Callable[[str], Path]) -> None:
    layer = (model := loaded(checkpoint("llama31"), num_ranks, rank))._layers[0]
    step = Step(model, MIXES["mixed"])
    without = step.outputs(layer)
    attention, mlp = layer.self_attention, layer.mlp
    assert isinstance(mlp, MLP)
    put_bias(attention.linear_proj)
    put_bias(mlp.linear_fc2)
    added = [not torch.equal(*outputs) for outputs in zip(without, step.outputs(layer), strict=True)]
    assert added == [rank == 0] * 2, "a sum over ranks has the bias of the first"
    put_bias(attention.linear_qkv)
    put_bias(mlp.linear_fc1)
    assert not any(torch.equal(*outputs) for outputs in zip(without, step.outputs(layer), strict=True))
    step.check(layer, step.residual)


def put_bias(linear: ColumnParallelLinear | RowParallelLinear) -> None:
    assert linear.panels is not None
    size, _ = sizes(linear.panels)
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(BF16)
    linear.bias = nn.Parameter(values, requires_grad=False)


def test_a_context_of_other_sizes_is_refused(checkpoint: Callable[[str], Path]) -> None:
    layer = (model := loaded(checkpoint("llama31")))._layers[0]
    attention, step = CompiledAttention.of(layer.input_layernorm, layer.self_attention), Step(model, MIXES["mixed"])
    assert attention is not None
    with pytest.raises(AssertionError):
        attention(step.hidden[1:], None, step.context()[0], None)
    for groups, head_dim in ((1, 16), (2, 32)):
        step.memory = torch.zeros(2, model.num_layers, 12, 8, groups, head_dim).to(BF16)
        with pytest.raises(AssertionError):
            attention(step.hidden, None, step.context()[0], None)


@pytest.mark.parametrize("name", ["llama31", "qwen3"])
def test_what_ranks_add_up_is_the_same_too(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = loaded(checkpoint(name), num_ranks=2)
    step = Step(model, MIXES["mixed"])
    step.check(model._layers[0], step.residual)


def test_many_tokens_go_through_an_mlp_a_part_at_a_time(checkpoint: Callable[[str], Path]) -> None:
    layer = loaded(checkpoint("llama31"))._layers[0]
    compiled = CompiledMLP.of(layer.pre_mlp_layernorm, layer.mlp)
    assert compiled is not None
    for tokens in (576, 577, 1201):
        hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(BF16)
        assert torch.equal(compiled(hidden, hidden), layer.mlp(layer.pre_mlp_layernorm(hidden), hidden))


def test_what_the_kernels_do_not_compute_is_left_to_the_modules(checkpoint: Callable[[str], Path]) -> None:
    layer = loaded(checkpoint("gpt2"))._layers[0]
    assert CompiledAttention.of(layer.input_layernorm, layer.self_attention) is None
    assert CompiledMLP.of(layer.pre_mlp_layernorm, layer.mlp) is None
    experts = loaded(checkpoint("mixtral"))._layers[0]
    assert CompiledAttention.of(experts.input_layernorm, experts.self_attention) is not None
    assert CompiledMLP.of(experts.pre_mlp_layernorm, experts.mlp) is None
