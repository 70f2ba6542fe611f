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

_PARTS = 4  # of a sum in float32; so many ranks, or 2, or 1, give the same bits


def empty_parameter(row: Row, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Room for a row under the local `sizes`; the loader fills it."""
    return nn.Parameter(torch.empty(row.stored_shape(sizes), dtype=dtype, device=device), requires_grad=False)


class PackedWeight(nn.Module):
    """A module whose `weight` [O, I] is only multiplied with, so that the CPU may keep it packed."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    @property
    def panels(self) -> Tensor | None:
        """The weight as `kernels.linear` takes it, if it lies so."""
        return self.weight if self.weight.dim() == 3 else None

    def take_weight(self, weight: Tensor) -> None:
        """Fills `weight` with a tensor of its shape and dtype on the CPU, maybe mapped memory, which is not kept."""
        layout = packed(weight) if self.weight.device.type == "cpu" else weight
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
    """y = r + sum over ranks of x W^T, plus b once: inputs divided, outputs and residual r whole. [T, I] -> [T, O].

    In float32 a CPU sums the same parts of the inputs in the same order on any of 1, 2 and 4 ranks. Sums that are
    rounded elsewhere differ by little, of which a deep model makes more than 1e-5 in a log-probability.
    parts: the weights [O, I / parts] that then stand in place of `weight`, packed.
    """

    def __init__(
        self, row: Row, bias: Row | None, sizes: dict[str, int], dtype: torch.dtype, device: torch.device, tp: Group
    ):
        super().__init__(empty_parameter(row, sizes, dtype, device))
        if not row.splits_input:
            raise ValueError(f"{row.name} is not split on an input axis; it is no row-parallel layer")
        self.bias = empty_parameter(bias, sizes, dtype, device) if bias else None
        self.parts: list[Tensor] = []
        self._tp = tp
        self._is_exact = dtype == torch.float32 and device.type == "cpu"
        in_parts = self._is_exact and self.weight.shape[1] * tp.size % _PARTS == 0
        self._num_parts = _PARTS // tp.size if in_parts else 1

    def take_weight(self, weight: Tensor) -> None:
        if self._num_parts > 1:
            parts = weight.chunk(self._num_parts, dim=1)
            self.parts = [packed(part.clone(memory_format=torch.contiguous_format)) for part in parts]
            self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        else:
            super().take_weight(weight)

    def sum_here(self, inputs: Tensor) -> Tensor:
        """[T, I] -> [T, O]: what this rank adds to the sum over ranks."""
        if not self.parts:
            return self.multiply(inputs)
        chunks = inputs.chunk(len(self.parts), dim=-1)
        sums = [linear(chunk, part) for chunk, part in zip(chunks, self.parts, strict=True)]
        while len(sums) > 1:  # neighbours, as ranks are summed
            sums = [left.add_(right) for left, right in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._is_exact:
            bias, residual = (self.bias, residual) if self.is_first else (None, None)
            return self.total(self.multiply(inputs, bias, residual))
        outputs = self.total(self.sum_here(inputs))
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs if residual is None else outputs + residual

    @property
    def is_first(self) -> bool:
        """Whether this rank's part of the sum has the bias and the residual in it: it is one rounding less."""
        return self._tp.rank == 0

    def total(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts."""
        return self._tp.all_reduce(part)


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
