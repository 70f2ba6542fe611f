"""Self-attention with grouped queries: projections, norms and rotation here, the attention itself in a backend.

T tokens, G KV heads on this rank, Q query heads a KV head, D head_dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from mindgen.attention.backend import AttentionContext
from mindgen.layers.linear import ColumnParallelLinear, RowParallelLinear
from mindgen.layers.norm import RMSNorm
from mindgen.layers.rope import rotate


class SelfAttention(nn.Module):
    """[T, hidden] -> [T, hidden] in the group-interleaved layout of Megatron's linear_qkv."""

    def __init__(
        self,
        layer: int,
        linear_qkv: ColumnParallelLinear,
        linear_proj: RowParallelLinear,
        q_layernorm: RMSNorm | None,
        k_layernorm: RMSNorm | None,
        sizes: dict[str, int],
    ):
        super().__init__()
        self.layer = layer
        self.linear_qkv = linear_qkv
        self.linear_proj = linear_proj
        self.q_layernorm = q_layernorm
        self.k_layernorm = k_layernorm
        self.num_kv_heads, self.head_dim = sizes["group"], sizes["head_dim"]
        self._width = sizes["qkv"]  # heads of a group: its queries, a key and a value

    def forward(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext, residual: Tensor
    ) -> Tensor:
        """`residual` plus what the tokens attend to."""
        qkv = self.linear_qkv(hidden).view(-1, self.num_kv_heads, self._width, self.head_dim)
        query, key = self._rotated(qkv[:, :, :-1], rope)  # [T, G, Q, D], [T, G, D]
        attended = context.attend(self.layer, query.flatten(1, 2), key, qkv[:, :, -1])
        return self.linear_proj(attended.flatten(1), residual)

    def _rotated(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """heads [T, G, Q + 1, D]: a group's queries and its key, which turn together."""
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(heads[:, :, :-1]), self.k_layernorm(heads[:, :, -1])
            return rotate(query, rope), rotate(key, rope)
        turned = rotate(heads, rope)
        return turned[:, :, :-1], turned[:, :, -1]
