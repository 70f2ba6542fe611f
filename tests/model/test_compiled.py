"""Halves of a layer in one call of the kernels: the bits that the modules give one by one, for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mindgen.attention.backend import choose_backend
from mindgen.attention.native import NativeContext
from mindgen.engine.kv_cache import KVCache
from mindgen.layers.compiled import CompiledAttention, CompiledMLP
from mindgen.layers.rope import RotaryEmbedding
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
# turned in part; neighbours that are turned.
WHOLE = ("llama31", "qwen3", "qwen2", "gemma2", "phi3", "glm4")


class Halves(SingleGroup):
    """A rank of two, the other of which always has the same."""

    size = 2

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        return tensor * 2


def loaded(folder: Path, num_ranks: int = 1) -> Decoder:
    source = open_huggingface(folder)
    topology, group = (SINGLE, SingleGroup()) if num_ranks == 1 else (Topology(0, num_ranks, 1), Halves())
    model = build_stage(source.spec, topology, group, BF16, CPU)
    load_weights(model, source, topology)
    return model


class Step:
    """A step of some sequences: hidden states and a cache in which something is."""

    def __init__(self, model: Decoder, mix: Mix):
        self.batch = make_batch(mix, Shape(block=8, blocks=12))
        tokens = len(self.batch.positions)
        self.model, generator = model, torch.Generator().manual_seed(tokens)
        self.hidden, self.residual = (torch.randn(tokens, 64, generator=generator).to(BF16) for _ in range(2))
        self.rotation = RotaryEmbedding(model._spec, BF16, CPU)(self.batch.positions, self.batch.is_long)
        shape = (model.num_layers, 12, 8, model.num_kv_heads, model.head_dim)
        self.memory = torch.randn(2, *shape, generator=generator).to(BF16)

    def context(self) -> tuple[NativeContext, KVCache]:
        """A context over a cache of its own."""
        cache = KVCache(*self.memory.shape[1:], BF16, CPU)
        for layer, (keys, values) in enumerate(zip(*self.memory, strict=True)):
            cache.keys[layer].copy_(keys)
            cache.values[layer].copy_(values)
        context = choose_backend("native", self.model.scores, CPU, BF16).prepare(self.batch, cache)
        assert isinstance(context, NativeContext)
        return context, cache

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
