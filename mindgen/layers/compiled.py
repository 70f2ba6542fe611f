"""Halves of a layer, with the norm before them, for the compiled kernels: one call for each. The twin is what the
modules compute one by one, to the same bits.

Made from modules whose weights are loaded, which are not replaced any more. T tokens, H hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from mindgen.attention.native import NativeContext
from mindgen.kernels.elementwise import GATES
from mindgen.kernels.layer import AttentionHalf, FeedForwardHalf, Normed, Product
from mindgen.layers.attention import SelfAttention
from mindgen.layers.linear import ColumnParallelLinear, RowParallelLinear
from mindgen.layers.mlp import MLP
from mindgen.layers.norm import Norm, RMSNorm
from mindgen.layers.rope import Rotation


class CompiledAttention:
    """Norm and self-attention: [T, H] -> [T, H]."""

    def __init__(self, half: AttentionHalf, layer: int, linear: RowParallelLinear):
        self._half = half
        self._layer = layer
        self._linear = linear

    @classmethod
    def of(cls, norm: Norm, attention: SelfAttention) -> CompiledAttention | None:
        """None where the kernels cannot compute it."""
        before, qkv, proj = _normed(norm), _column(attention.linear_qkv), _row(attention.linear_proj)
        query_norm, key_norm = attention.q_layernorm, attention.k_layernorm
        if before is None or qkv is None or proj is None:
            return None
        if query_norm is None or key_norm is None:
            heads = None
        elif isinstance(query_norm, RMSNorm) and isinstance(key_norm, RMSNorm):
            heads = query_norm.weight, key_norm.weight
        else:
            return None
        half = AttentionHalf(before, qkv, heads, proj, attention.num_kv_heads)
        return cls(half, attention.layer, attention.linear_proj)

    def __call__(
        self, hidden: Tensor, rotation: Rotation | None, context: NativeContext, residual: Tensor | None
    ) -> Tensor:
        """What the tokens attend to, plus `residual`."""
        residual = residual if self._linear.is_first else None
        return self._linear.total(context.attend_half(self._layer, self._half, hidden, rotation, residual))


class CompiledMLP:
    """Norm and feed-forward block: [T, H] -> [T, H]."""

    def __init__(self, half: FeedForwardHalf, linear: RowParallelLinear):
        self._half = half
        self._linear = linear

    @classmethod
    def of(cls, norm: Norm, mlp: nn.Module) -> CompiledMLP | None:
        """None where the kernels cannot compute it."""
        if not isinstance(mlp, MLP) or mlp.gate not in GATES:
            return None
        before, up, down = _normed(norm), _column(mlp.linear_fc1), _row(mlp.linear_fc2)
        if before is None or up is None or down is None:
            return None
        return cls(FeedForwardHalf(before, up, mlp.gate, down), mlp.linear_fc2)

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """The block's outputs, plus `residual`."""
        return self._linear.total(self._half(hidden, residual if self._linear.is_first else None))


def _normed(norm: Norm) -> Normed | None:
    return norm.numbers if isinstance(norm, RMSNorm) else None


def _column(linear: ColumnParallelLinear) -> Product | None:
    return None if linear.panels is None else Product(linear.panels, linear.bias)


def _row(linear: RowParallelLinear) -> Product | None:
    """With the bias on one rank: it comes once."""
    return None if linear.panels is None else Product(linear.panels, linear.bias if linear.is_first else None)
