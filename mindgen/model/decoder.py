"""One decoder. A spec and rows make it a Llama or a Qwen; the names of its parameters are the rows' names.

T tokens in the batch, R rows whose logits are wanted.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindgen.attention.backend import AttentionContext
from mindgen.attention.native import NativeContext
from mindgen.attention.scores import Scores
from mindgen.layers.attention import SelfAttention
from mindgen.layers.compiled import CompiledAttention, CompiledMLP
from mindgen.layers.experts import ExpertMLP
from mindgen.layers.linear import PackedWeight, PositionEmbedding, VocabParallelEmbedding
from mindgen.layers.mlp import MLP
from mindgen.layers.norm import Norm
from mindgen.layers.rope import RotaryEmbedding, Rotation
from mindgen.parallel.group import Group
from mindgen.spec import ModelSpec


class DecoderLayer(nn.Module):
    """Norm, attention, add; norm, MLP, add. With norms after them too, what is added is normed (sandwich norms)."""

    def __init__(
        self,
        norm: Norm,
        attention: SelfAttention,
        mlp_norm: Norm,
        mlp: MLP | ExpertMLP,
        after: tuple[Norm, Norm] | None = None,
    ):
        super().__init__()
        self.input_layernorm = norm
        self.self_attention = attention
        self.pre_mlp_layernorm = mlp_norm
        self.mlp = mlp
        if after is not None:
            self.post_attn_norm, self.post_mlp_layernorm = after
        self._is_sandwich = after is not None

    def forward(self, hidden: Tensor, rotation: Rotation | None, context: AttentionContext) -> Tensor:
        if self._is_sandwich:
            hidden = hidden + self.post_attn_norm(self._attend(hidden, rotation, context, None))
            return hidden + self.post_mlp_layernorm(self._feed_forward(hidden, None))
        hidden = self._attend(hidden, rotation, context, residual=hidden)
        return self._feed_forward(hidden, residual=hidden)

    def _attend(
        self, hidden: Tensor, rotation: Rotation | None, context: AttentionContext, residual: Tensor | None
    ) -> Tensor:
        compiled, _ = self._compiled
        if compiled is not None and isinstance(context, NativeContext):
            return compiled(hidden, rotation, context, residual)
        return self.self_attention(self.input_layernorm(hidden), rotation, context, residual)

    def _feed_forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        _, compiled = self._compiled
        if compiled is not None:
            return compiled(hidden, residual)
        return self.mlp(self.pre_mlp_layernorm(hidden), residual)

    @cached_property
    def _compiled(self) -> tuple[CompiledAttention | None, CompiledMLP | None]:
        """Its halves, where the kernels compute them. The first call of the layer makes them: weights are loaded."""
        attention = CompiledAttention.of(self.input_layernorm, self.self_attention)
        return attention, CompiledMLP.of(self.pre_mlp_layernorm, self.mlp)


class Embedding(nn.Module):
    """Tokens to hidden states: word embeddings, scaled or normed, plus position embeddings where there are some."""

    def __init__(
        self,
        word_embeddings: VocabParallelEmbedding,
        position_embeddings: PositionEmbedding | None,
        norm: Norm | None,
        scale: float | None,
    ):
        super().__init__()
        self.word_embeddings = word_embeddings
        if norm is not None:
            word_embeddings.add_module("norm", norm)  # MindSpeed-LLM's name for it
        self._norm = (norm,)  # under no second name
        self.position_embeddings = position_embeddings
        # rounded as the numbers that it multiplies, and a number of the host's: a tensor made in each step costs a copy
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=word_embeddings.weight.dtype))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions [T] -> [T, hidden]."""
        hidden = self.word_embeddings(tokens)
        if self._scale is not None:
            hidden = hidden * self._scale
        if self._norm[0] is not None:
            hidden = self._norm[0](hidden)
        return hidden if self.position_embeddings is None else hidden + self.position_embeddings(positions)


class Head(PackedWeight):
    """The output layer, with a weight of [vocab / tp, hidden], whose rows have length one if it is normalised."""

    def __init__(self, weight: nn.Parameter, is_normalised: bool):
        super().__init__(weight)
        self._is_normalised = is_normalised

    def take_weight(self, weight: Tensor) -> None:
        super().take_weight(F.normalize(weight) if self._is_normalised else weight)


class Decoder(nn.Module):
    """A pipeline stage: the embedding on the first, layers on each, the final norm and the head on the last."""

    def __init__(
        self,
        embedding: Embedding | None,
        layers: list[DecoderLayer],
        final_layernorm: Norm | None,
        output_layer: Head | None,
        rope: RotaryEmbedding | None,
        scores: Scores,
        tp: Group,
        spec: ModelSpec,
    ):
        super().__init__()
        self.embedding = embedding
        self.scores = scores
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        if final_layernorm is not None:
            self.decoder["final_layernorm"] = final_layernorm
        self.output_layer = output_layer
        head = output_layer or (embedding.word_embeddings if embedding else None)
        self._ends = (final_layernorm, head)  # typed, under no second name
        self._layers = layers
        self._rope = rope
        self._tp = tp
        self._spec = spec

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
    def has_experts(self) -> bool:
        """Whether layers of the model have experts, on this stage or another."""
        return self._spec.num_experts is not None

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
        positions = context.positions.to(inputs.device)
        hidden = inputs if self.embedding is None else self.embedding(inputs, positions)
        rotation = None if self._rope is None else self._rope(positions, context.is_long.to(inputs.device))
        for layer in self._layers:
            hidden = layer(hidden, rotation, context)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] of the last stage -> float32 logits [R, vocab] over the true vocabulary.

        A collective over the tensor group: every rank gets all columns.
        """
        final_layernorm, head = self._ends
        assert final_layernorm is not None and head is not None, "only the last stage has a head"
        local = head.multiply(final_layernorm(hidden)).float()
        logits = self._tp.all_gather(local, dim=-1)[:, : self._spec.vocab_size]
        cap = self._spec.logits_softcap
        return logits if cap is None else logits.div(cap).tanh_().mul_(cap)
