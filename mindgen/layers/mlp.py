"""The gated feed-forward block: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mindgen.layers.linear import ColumnParallelLinear, RowParallelLinear


class GatedMLP(nn.Module):
    """[T, hidden] -> [T, hidden]; this rank's gate and up lie one after the other in linear_fc1."""

    def __init__(self, linear_fc1: ColumnParallelLinear, linear_fc2: RowParallelLinear):
        super().__init__()
        self.linear_fc1 = linear_fc1
        self.linear_fc2 = linear_fc2

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """`residual` plus the block's outputs."""
        gate, up = self.linear_fc1(hidden).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate).mul_(up), residual)
