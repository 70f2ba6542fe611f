"""One decoder. A spec and rows make it a Llama or a Qwen; the names of its parameters are the rows' names.

T tokens in the batch, R rows whose logits are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindgen.attention.backend import AttentionContext
from mindgen.layers.attention import SelfAttention
from mindgen.layers.linear import PackedWeight, VocabParallelEmbedding
from mindgen.layers.mlp import GatedMLP
from mindgen.layers.norm import RMSNorm
from mindgen.layers.rope import RotaryEmbedding
from mindgen.parallel.group import Group


class DecoderLayer(nn.Module):
    """Norm, attention, add; norm, MLP, add."""

    def __init__(self, norm: RMSNorm, attention: SelfAttention, mlp_norm: RMSNorm, mlp: GatedMLP):
        super().__init__()
        self.input_layernorm = norm
        self.self_attention = attention
        self.pre_mlp_layernorm = mlp_norm
        self.mlp = mlp

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        hidden = self.self_attention(self.input_layernorm(hidden), rope, context, residual=hidden)
        return self.mlp(self.pre_mlp_layernorm(hidden), residual=hidden)


class Head(PackedWeight):
    """The output layer, with a weight of [vocab / tp, hidden]."""


class Decoder(nn.Module):
    """A pipeline stage: the embedding on the first, layers on each, the final norm and the head on the last."""

    def __init__(
        self,
        embedding: VocabParallelEmbedding | None,
        layers: list[DecoderLayer],
        final_layernorm: RMSNorm | None,
        output_layer: Head | None,
        rope: RotaryEmbedding,
        tp: Group,
        vocab_size: int,
    ):
        super().__init__()
        self.embedding = nn.ModuleDict({"word_embeddings": embedding} if embedding else {})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        if final_layernorm is not None:
            self.decoder["final_layernorm"] = final_layernorm
        self.output_layer = output_layer
        self._ends = (embedding, final_layernorm, output_layer or embedding)  # typed, under no second name
        self._layers = layers
        self._rope = rope
        self._tp = tp
        self._vocab_size = vocab_size

    @property
    def num_layers(self) -> int:
        """Layers of this stage."""
        return len(self._layers)

    @property
    def num_kv_heads(self) -> int:
        """KV heads on this rank."""
        return self._layers[0].self_attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self._layers[0].self_attention.head_dim

    @property
    def hidden_size(self) -> int:
        """Elements of a hidden state."""
        return self._layers[0].input_layernorm.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and hidden states."""
        return self._layers[0].input_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._layers[0].input_layernorm.weight.device

    def forward(self, inputs: Tensor, context: AttentionContext) -> Tensor:
        """Token ids [T] on the first stage, else hidden states [T, hidden] -> hidden states [T, hidden]."""
        embedding = self._ends[0]
        hidden = inputs if embedding is None else embedding(inputs)
        rope = self._rope(context.positions.to(hidden.device))
        for layer in self._layers:
            hidden = layer(hidden, rope, context)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] of the last stage -> float32 logits [R, vocab] over the true vocabulary.

        A collective over the tensor group: every rank gets all columns.
        """
        _, final_layernorm, head = self._ends
        assert final_layernorm is not None and head is not None, "only the last stage has a head"
        local = head.multiply(final_layernorm(hidden)).float()
        return self._tp.all_gather(local, dim=-1)[:, : self._vocab_size]
