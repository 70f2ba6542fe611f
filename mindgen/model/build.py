"""A decoder from a spec: the rows say which modules a layer has and how wide they are on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from mindgen.attention.scores import Scores, alibi_slopes
from mindgen.layers.attention import SelfAttention
from mindgen.layers.experts import ExpertMLP, Router, SharedExperts
from mindgen.layers.linear import (
    ColumnParallelLinear,
    PositionEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
    empty_parameter,
)
from mindgen.layers.mlp import MLP
from mindgen.layers.norm import LayerNorm, Norm, RMSNorm
from mindgen.layers.rope import RotaryEmbedding
from mindgen.model.decoder import Decoder, DecoderLayer, Embedding, Head
from mindgen.parallel.group import Group
from mindgen.parallel.topology import Topology, split_layers
from mindgen.spec import ModelSpec
from mindgen.weights.families import rows_of
from mindgen.weights.rows import EMBEDDING, HEAD, Row, check_divides, local_experts, local_sizes, parameters

_LAYER = "decoder.layers.{layer}."


def build_stage(
    spec: ModelSpec,
    topology: Topology,
    tp: Group,
    dtype: torch.dtype,
    device: torch.device,
    layer_list: tuple[int, ...] | None = None,
) -> Decoder:
    """One rank's part of the model with its weights not yet filled. Raises ValueError if sizes do not divide."""
    check_divides(spec, topology.tp, topology.ep)
    layers = split_layers(spec.num_layers, topology.pp, layer_list)[topology.pp_rank]
    builder = _Builder(spec, topology, tp, dtype, device)
    return Decoder(
        embedding=builder.embedding() if topology.is_first_stage else None,
        layers=[builder.layer(local, layer) for local, layer in enumerate(layers)],
        final_layernorm=builder.norm("decoder.final_layernorm") if topology.is_last_stage else None,
        output_layer=builder.head() if topology.is_last_stage else None,
        rope=RotaryEmbedding(spec, dtype, device) if spec.positions == "rope" else None,
        scores=make_scores(spec, topology, layers, device),
        tp=tp,
        spec=spec,
    )


def make_scores(spec: ModelSpec, topology: Topology, layers: Sequence[int], device: torch.device) -> Scores:
    """What attention computes in `layers` (global numbers) on one tensor rank."""
    slopes = None
    if spec.positions == "alibi":
        each = spec.num_heads // topology.tp
        slopes = alibi_slopes(spec.num_heads)[topology.tp_rank * each :][:each].to(device)
    scale = (spec.query_scalar or spec.head_dim) ** -0.5
    return Scores(scale, tuple(spec.window(layer) for layer in layers), spec.attention_softcap, slopes)


class _Builder:
    def __init__(self, spec: ModelSpec, topology: Topology, tp: Group, dtype: torch.dtype, device: torch.device):
        self._spec, self._topology, self._tp, self._dtype, self._device = spec, topology, tp, dtype, device
        self._rows: dict[str, Row] = {row.name: row for row in rows_of(spec.family)}
        self._sizes = local_sizes(spec, topology)

    def embedding(self) -> Embedding:
        row, packs_head = self._rows[EMBEDDING], self._is_tied and self._has_room_for_head()
        words = VocabParallelEmbedding(row, self._sizes, self._dtype, self._device, self._tp, packs_head)
        places = self._rows.get("embedding.position_embeddings.weight")
        learned = PositionEmbedding(places, self._sizes, self._dtype, self._device) if places else None
        normed = "embedding.word_embeddings.norm"
        norm = self.norm(normed) if f"{normed}.weight" in self._rows else None
        return Embedding(words, learned, norm, self._spec.hidden_size**0.5 if self._spec.embedding_scale else None)

    def head(self) -> Head | None:
        if self._is_tied:
            return None
        weight = empty_parameter(self._rows[HEAD], self._sizes, self._dtype, self._device)
        return Head(weight, self._spec.normalised_head)

    @property
    def _is_tied(self) -> bool:
        return self._spec.tie_embeddings and self._topology.pp == 1

    def _has_room_for_head(self) -> bool:
        """A tied head is a second copy once it is packed; that may cost a quarter of the weights, not more."""
        places = parameters(tuple(self._rows.values()), self._spec, self._topology)
        layers = sum(prod(place.row.stored_shape(self._sizes)) for place in places if place.layer is not None)
        embedding = prod(self._rows[EMBEDDING].stored_shape(self._sizes))
        return 4 * embedding <= embedding + layers

    def norm(self, name: str) -> Norm:
        """A norm by its module's name."""
        row, bias = self._rows[f"{name}.weight"], self._rows.get(f"{name}.bias")
        if self._spec.normalization == "RMSNorm":
            return RMSNorm(row, self._sizes, self._spec, self._dtype, self._device)
        assert bias is not None, f"{name} has no bias row"
        return LayerNorm(row, bias, self._sizes, self._spec, self._dtype, self._device)

    def layer(self, local: int, layer: int) -> DecoderLayer:
        """A layer by its number in the stage and in the model."""
        after = None
        if self._has("post_attn_norm"):
            after = self.norm(_LAYER + "post_attn_norm"), self.norm(_LAYER + "post_mlp_layernorm")
        return DecoderLayer(
            self.norm(_LAYER + "input_layernorm"),
            self._attention(local),
            self.norm(_LAYER + "pre_mlp_layernorm"),
            self._experts() if self._spec.has_experts(layer) else self._mlp("mlp"),
            after,
        )

    def _mlp(self, name: str) -> MLP:
        is_gated = "gate_up" in self._rows[f"{_LAYER}{name}.linear_fc1.weight"].names
        fc1, fc2 = self._column(f"{name}.linear_fc1"), self._row(f"{name}.linear_fc2")
        return MLP(fc1, fc2, self._spec.activation, is_gated)

    def _experts(self) -> ExpertMLP:
        spec, mine = self._spec, local_experts(self._spec, self._topology)
        assert spec.experts_per_token is not None
        router = Router(self._empty("mlp.router.weight"), spec.experts_per_token, spec.renormalise_experts)
        experts = [self._mlp("mlp.experts.local_experts.{expert}") for _ in mine]
        return ExpertMLP(router, experts, mine.start, self._shared_experts(), self._tp)

    def _shared_experts(self) -> SharedExperts | None:
        name = "mlp.shared_experts"
        if f"{_LAYER}{name}.linear_fc1.weight" not in self._rows:
            return None
        gate = self._empty(f"{name}.gate_weight") if f"{_LAYER}{name}.gate_weight" in self._rows else None
        fc1, fc2 = self._column(f"{name}.linear_fc1"), self._row(f"{name}.linear_fc2")
        return SharedExperts(fc1, fc2, self._spec.activation, gate)

    def _empty(self, name: str) -> nn.Parameter:
        return empty_parameter(self._rows[_LAYER + name], self._sizes, self._dtype, self._device)

    def _attention(self, local: int) -> SelfAttention:
        return SelfAttention(
            local,
            self._column("self_attention.linear_qkv"),
            self._row("self_attention.linear_proj"),
            self._optional_norm("self_attention.q_layernorm"),
            self._optional_norm("self_attention.k_layernorm"),
            self._sizes,
        )

    def _optional_norm(self, name: str) -> Norm | None:
        return self.norm(_LAYER + name) if self._has(name) else None

    def _has(self, name: str) -> bool:
        return f"{_LAYER}{name}.weight" in self._rows

    def _column(self, name: str) -> ColumnParallelLinear:
        row, bias = self._rows[f"{_LAYER}{name}.weight"], self._rows.get(f"{_LAYER}{name}.bias")
        return ColumnParallelLinear(row, bias, self._sizes, self._dtype, self._device)

    def _row(self, name: str) -> RowParallelLinear:
        row, bias = self._rows[f"{_LAYER}{name}.weight"], self._rows.get(f"{_LAYER}{name}.bias")
        return RowParallelLinear(row, bias, self._sizes, self._dtype, self._device, self._tp)
