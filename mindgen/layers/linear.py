"""Linear layers and the embedding, split as their rows say.

T tokens, I input features, O output features, all on this rank; H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindgen.parallel.group import Group
from mindgen.weights.rows import Row


def empty_parameter(row: Row, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Room for a row under the local `sizes`; the loader fills it."""
    return nn.Parameter(torch.empty(row.stored_shape(sizes), dtype=dtype, device=device), requires_grad=False)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the outputs divided over the group: no communication. [T, I] -> [T, O]."""

    def __init__(self, row: Row, bias: Row | None, sizes: dict[str, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        if row.split is None or row.splits_input:
            raise ValueError(f"{row.name} is not split on an output axis; it is no column-parallel layer")
        self.weight = empty_parameter(row, sizes, dtype, device)
        self.bias = empty_parameter(bias, sizes, dtype, device) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x W^T, plus b once: inputs divided, outputs whole. [T, I] -> [T, O]."""

    def __init__(
        self, row: Row, bias: Row | None, sizes: dict[str, int], dtype: torch.dtype, device: torch.device, tp: Group
    ):
        super().__init__()
        if not row.splits_input:
            raise ValueError(f"{row.name} is not split on an input axis; it is no row-parallel layer")
        self.weight = empty_parameter(row, sizes, dtype, device)
        self.bias = empty_parameter(bias, sizes, dtype, device) if bias else None
        self._tp = tp

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self._tp.all_reduce(F.linear(inputs, self.weight))
        return outputs if self.bias is None else outputs + self.bias


class VocabParallelEmbedding(nn.Module):
    """Looks tokens up in the rows that this rank holds; an all-reduce brings in the others. [T] -> [T, H]."""

    def __init__(self, row: Row, sizes: dict[str, int], dtype: torch.dtype, device: torch.device, tp: Group):
        super().__init__()
        self.weight = empty_parameter(row, sizes, dtype, device)
        self._tp = tp

    def forward(self, tokens: Tensor) -> Tensor:
        if self._tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self._tp.rank * rows
        here = (local >= 0) & (local < rows)
        hidden = F.embedding(local.clamp(0, rows - 1), self.weight)
        return self._tp.all_reduce(hidden.masked_fill_(~here.unsqueeze(-1), 0))
