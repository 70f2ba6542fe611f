"""A decoder from a spec: the rows say which modules a layer has and how wide they are on this rank."""

from __future__ import annotations

from math import prod

import torch

from mindgen.layers.attention import SelfAttention
from mindgen.layers.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, empty_parameter
from mindgen.layers.mlp import GatedMLP
from mindgen.layers.norm import RMSNorm
from mindgen.layers.rope import RotaryEmbedding
from mindgen.model.decoder import Decoder, DecoderLayer, Head
from mindgen.parallel.group import Group
from mindgen.parallel.topology import Topology, split_layers
from mindgen.spec import ModelSpec
from mindgen.weights.families import rows_of
from mindgen.weights.rows import EMBEDDING, HEAD, Row, check_divides, local_sizes

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
    check_divides(spec, topology.tp)
    builder = _Builder(spec, topology, tp, dtype, device)
    layers = split_layers(spec.num_layers, topology.pp, layer_list)[topology.pp_rank]
    return Decoder(
        embedding=builder.embedding() if topology.is_first_stage else None,
        layers=[builder.layer(local) for local in range(len(layers))],
        final_layernorm=builder.norm("decoder.final_layernorm.weight") if topology.is_last_stage else None,
        output_layer=builder.head() if topology.is_last_stage else None,
        rope=RotaryEmbedding(spec, dtype, device),
        tp=tp,
        vocab_size=spec.vocab_size,
    )


class _Builder:
    def __init__(self, spec: ModelSpec, topology: Topology, tp: Group, dtype: torch.dtype, device: torch.device):
        self._spec, self._topology, self._tp, self._dtype, self._device = spec, topology, tp, dtype, device
        self._rows: dict[str, Row] = {row.name: row for row in rows_of(spec.family)}
        self._sizes = local_sizes(spec, topology.tp)

    def embedding(self) -> VocabParallelEmbedding:
        row, packs_head = self._rows[EMBEDDING], self._is_tied and self._has_room_for_head()
        return VocabParallelEmbedding(row, self._sizes, self._dtype, self._device, self._tp, packs_head)

    def head(self) -> Head | None:
        if self._is_tied:
            return None
        return Head(empty_parameter(self._rows[HEAD], self._sizes, self._dtype, self._device))

    @property
    def _is_tied(self) -> bool:
        return self._spec.tie_embeddings and self._topology.pp == 1

    def _has_room_for_head(self) -> bool:
        """A tied head is a second copy once it is packed; that may cost a quarter of the weights, not more."""
        layer = sum(prod(row.stored_shape(self._sizes)) for row in self._rows.values() if row.stage == "layer")
        embedding = prod(self._rows[EMBEDDING].stored_shape(self._sizes))
        return 4 * embedding <= embedding + layer * self._spec.num_layers

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._rows[name], self._sizes, self._spec.norm_epsilon, self._dtype, self._device)

    def layer(self, local: int) -> DecoderLayer:
        return DecoderLayer(
            self.norm(_LAYER + "input_layernorm.weight"),
            self._attention(local),
            self.norm(_LAYER + "pre_mlp_layernorm.weight"),
            GatedMLP(self._column("mlp.linear_fc1"), self._row("mlp.linear_fc2")),
        )

    def _attention(self, local: int) -> SelfAttention:
        return SelfAttention(
            local,
            self._column("self_attention.linear_qkv"),
            self._row("self_attention.linear_proj"),
            self._optional_norm("self_attention.q_layernorm.weight"),
            self._optional_norm("self_attention.k_layernorm.weight"),
            self._sizes,
        )

    def _optional_norm(self, name: str) -> RMSNorm | None:
        return self.norm(_LAYER + name) if _LAYER + name in self._rows else None

    def _column(self, name: str) -> ColumnParallelLinear:
        row, bias = self._rows[f"{_LAYER}{name}.weight"], self._rows.get(f"{_LAYER}{name}.bias")
        return ColumnParallelLinear(row, bias, self._sizes, self._dtype, self._device)

    def _row(self, name: str) -> RowParallelLinear:
        row, bias = self._rows[f"{_LAYER}{name}.weight"], self._rows.get(f"{_LAYER}{name}.bias")
        return RowParallelLinear(row, bias, self._sizes, self._dtype, self._device, self._tp)
