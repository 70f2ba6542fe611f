"""Float32 on a CPU: the same bits at any tensor parallel size, and whatever else is in the batch.

Only so do log-probabilities agree: a deep model makes 1e-5 of what the last bit of a sum was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mindgen.layers.linear import RowParallelLinear
from mindgen.layers.mlp import ACTIVATIONS, activated, gated
from mindgen.layers.packed import linear, packed
from mindgen.parallel.group import SingleGroup
from mindgen.weights.families import rows_of
from mindgen.weights.rows import Row

CPU = torch.device("cpu")
INPUTS, OUTPUTS = 192, 80


@dataclass
class Place(SingleGroup):
    """A rank of a group whose sum is made by the test: it sees the parts, and then says what they make."""

    rank: int
    size: int
    part: Tensor | None = None
    total: Tensor | None = None

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        self.part = tensor.clone()
        return tensor if self.total is None else tensor.copy_(self.total)


def row_parallel(weight: Tensor, rank: int, size: int) -> RowParallelLinear:
    row: Row = next(row for row in rows_of("llama") if row.name.endswith("linear_fc2.weight"))
    sizes = {"hidden": OUTPUTS, "ffn": INPUTS // size}
    group = Place(rank, size)
    layer = RowParallelLinear(row, None, sizes, torch.float32, CPU, group)
    layer.take_weight(weight.chunk(size, dim=1)[rank])
    return layer


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_sum_over_ranks_is_that_of_one_rank(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((OUTPUTS, INPUTS), (rows, INPUTS), (rows, OUTPUTS))
    weight, inputs, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    alone = row_parallel(weight, 0, 1)(inputs, residual)
    torch.testing.assert_close(alone, inputs @ weight.T + residual, rtol=1e-5, atol=1e-4)
    for size in (2, 4):
        parts = inputs.chunk(size, dim=1)
        layers = [row_parallel(weight, rank, size) for rank in range(size)]
        sums = [part_of(layer, inputs, residual) for layer, inputs in zip(layers, parts, strict=True)]
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        for layer, mine in zip(layers, parts, strict=True):
            place_of(layer).total = sums[0]
            assert torch.equal(layer(mine, residual), alone)


def place_of(layer: RowParallelLinear) -> Place:
    assert isinstance(layer._tp, Place)
    return layer._tp


def part_of(layer: RowParallelLinear, inputs: Tensor, residual: Tensor) -> Tensor:
    layer(inputs, residual)
    part = place_of(layer).part
    assert part is not None
    return part


@pytest.mark.parametrize("way", [packed, torch.Tensor.clone], ids=["packed", "plain"])
@pytest.mark.parametrize("inputs", [64, 1500])
def test_a_row_is_computed_alike_however_many_there_are(inputs: int, way: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(inputs)
    rows, weight = torch.randn(9, inputs, generator=generator), way(torch.randn(352, inputs, generator=generator))
    residual, bias = torch.randn(9, 352, generator=generator), torch.randn(352, generator=generator)
    together = linear(rows, weight, bias, residual)
    for count in range(1, 9):
        assert torch.equal(linear(rows[:count], weight, bias, residual[:count]), together[:count]), count


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_do_not_depend_on_how_many_there_are(activation: str) -> None:
    both = torch.randn(70, 2 * 96, generator=torch.Generator().manual_seed(0)) * 2
    whole, half = gated(both, activation), torch.cat([both[:, :48], both[:, 96:144]], dim=1)
    assert torch.equal(gated(half, activation), whole[:, :48])
    assert torch.equal(gated(both[:1], activation), whole[:1])
    assert torch.equal(activated(both[:, :48], activation), activated(both, activation)[:, :48])
