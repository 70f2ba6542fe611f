"""Linear layers and the embedding, split as their rows say.

T tokens, I input features, O output features, all on this rank; H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindgen.layers.packed import linear, packed
from mindgen.parallel.group import Group
from mindgen.weights.rows import Row


def empty_parameter(row: Row, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Room for a row under the local `sizes`; the loader fills it."""
    return nn.Parameter(torch.empty(row.stored_shape(sizes), dtype=dtype, device=device), requires_grad=False)


class PackedWeight(nn.Module):
    """A module whose `weight` [O, I] is only multiplied with, so that the CPU may keep it packed."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def take_weight(self, weight: Tensor) -> None:
        """Fills `weight` with a tensor of its shape and dtype; the tensor may be mapped memory and is not kept."""
        layout = packed(weight)
        if layout is weight:
            self.weight.data.copy_(weight)
        else:
            self.weight = nn.Parameter(layout, requires_grad=False)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O]: inputs times the weight, plus what is given."""
        return linear(inputs, self.weight, bias, residual)


class ColumnParallelLinear(PackedWeight):
    """y = x W^T + b with the outputs divided over the group: no communication. [T, I] -> [T, O]."""

    def __init__(self, row: Row, bias: Row | None, sizes: dict[str, int], dtype: torch.dtype, device: torch.device):
        super().__init__(empty_parameter(row, sizes, dtype, device))
        if row.split is None or row.splits_input:
            raise ValueError(f"{row.name} is not split on an output axis; it is no column-parallel layer")
        self.bias = empty_parameter(bias, sizes, dtype, device) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        return self.multiply(inputs, self.bias)


class RowParallelLinear(PackedWeight):
    """y = r + sum over ranks of x W^T, plus b once: inputs divided, outputs and residual r whole. [T, I] -> [T, O]."""

    def __init__(
        self, row: Row, bias: Row | None, sizes: dict[str, int], dtype: torch.dtype, device: torch.device, tp: Group
    ):
        super().__init__(empty_parameter(row, sizes, dtype, device))
        if not row.splits_input:
            raise ValueError(f"{row.name} is not split on an input axis; it is no row-parallel layer")
        self.bias = empty_parameter(bias, sizes, dtype, device) if bias else None
        self._tp = tp

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._tp.size == 1:
            return self.multiply(inputs, self.bias, residual)
        outputs = self._tp.all_reduce(self.multiply(inputs))
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs if residual is None else outputs.add_(residual)


class VocabParallelEmbedding(nn.Module):
    """Looks tokens up in the rows that this rank holds; an all-reduce brings in the others. [T] -> [T, H].

    packs_head: the weight is the output layer's too, and there is room for a second, packed copy of it.
    """

    def __init__(
        self,
        row: Row,
        sizes: dict[str, int],
        dtype: torch.dtype,
        device: torch.device,
        tp: Group,
        packs_head: bool = False,
    ):
        super().__init__()
        self.weight = empty_parameter(row, sizes, dtype, device)
        self._packed: Tensor | None = None
        self._packs_head = packs_head
        self._tp = tp

    def take_weight(self, weight: Tensor) -> None:
        """Fills `weight` with a tensor of its shape and dtype."""
        self.weight.data.copy_(weight)
        if self._packs_head:
            self._packed = packed(self.weight.data)

    def multiply(self, inputs: Tensor) -> Tensor:
        """As a tied output layer: [R, H] -> [R, rows of this rank]."""
        return linear(inputs, self.weight if self._packed is None else self._packed)

    def forward(self, tokens: Tensor) -> Tensor:
        if self._tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self._tp.rank * rows
        here = (local >= 0) & (local < rows)
        hidden = F.embedding(local.clamp(0, rows - 1), self.weight)
        return self._tp.all_reduce(hidden.masked_fill_(~here.unsqueeze(-1), 0))


class PositionEmbedding(nn.Module):
    """A learned vector for each position. [T] -> [T, H]."""

    def __init__(self, row: Row, sizes: dict[str, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = empty_parameter(row, sizes, dtype, device)

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.weight)
