"""Compact panels: every number comes back, whatever the weight holds, and products see nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mindgen.kernels.library import unavailable
from mindgen.kernels.linear import multiply, num_bytes, pack, unpack
from mindgen.layers.packed import stored_share

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SHAPES = ((32, 2), (64, 6), (32, 128), (96, 130), (64, 514), (160, 2048))  # chunks of 64 pairs, whole and not


def usual(outputs: int, inputs: int) -> Tensor:
    return (torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs)) * 0.02).bfloat16()


def scattered(weight: Tensor, every: int, *values: float) -> Tensor:
    """Some values, by turns, at every so many numbers."""
    flat = weight.flatten()
    places = torch.arange(0, flat.numel(), every)
    flat[places] = torch.tensor(values).bfloat16()[torch.arange(len(places)) % len(values)]
    return flat.view_as(weight)


def with_strays(outputs: int, inputs: int) -> Tensor:
    """Numbers far from the others, in both directions, in every place of a pair."""
    return scattered(usual(outputs, inputs), 521, 3e38, -0.0, 1e-30, -700.0, 0.0, float("inf"), -1e-39, float("nan"))


def with_plain_panels(outputs: int, inputs: int) -> Tensor:
    """Of every two panels one has too many strays."""
    weight = usual(outputs, inputs)
    for panel in range(0, outputs // 32, 2):
        scattered(weight[32 * panel : 32 * panel + 32], 7, 1e9, 0.0)
    return weight


def patterns(outputs: int, inputs: int) -> Tensor:
    """All numbers that there are, as many as fit."""
    return torch.arange(outputs * inputs).to(torch.int16).view(torch.bfloat16).view(outputs, inputs)


def constant(outputs: int, inputs: int) -> Tensor:
    return torch.full((outputs, inputs), -1.5).bfloat16()


def nothing(outputs: int, inputs: int) -> Tensor:
    return torch.zeros(outputs, inputs).bfloat16()


def pruned(outputs: int, inputs: int) -> Tensor:
    return scattered(usual(outputs, inputs), 2, 0.0)


KINDS = (usual, with_strays, with_plain_panels, patterns, constant, nothing, pruned)


def bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.int16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_number_comes_back(kind: Callable[[int, int], Tensor], shape: tuple[int, int]) -> None:
    weight = kind(*shape)
    assert torch.equal(bits(unpack(pack(weight))), bits(weight))


@pytest.mark.parametrize("places", [range(65), range(4000, 4100), range(8190, 8320)], ids=str)
def test_a_stray_is_put_right_wherever_it_is(places: range) -> None:
    weight = usual(32, 260)
    for place in places:
        flat = weight.clone().flatten()
        flat[place] = 1e9
        assert torch.equal(unpack(pack(flat.view_as(weight))).flatten(), flat), place


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 12, 13, 25, 49, 100])
@pytest.mark.parametrize("kind", (usual, with_plain_panels, pruned), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", [(96, 130), (160, 2048)], ids=str)
def test_products_see_the_numbers_of_the_weight(
    shape: tuple[int, int], kind: Callable[[int, int], Tensor], rows: int
) -> None:
    inputs = shape[1]
    x, weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16(), kind(*shape)
    exact, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    error = (multiply(x, pack(weight)).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + (sizes + 8) * inputs * 2**-24).all()


def test_strays_reach_the_products_of_any_number_of_rows() -> None:
    weight = nothing(96, 520)
    weight[5, 130], weight[40, 519], weight[95, 0] = 3.0, -2.0, 7.0
    for rows in (1, 2, 5, 12, 14, 60):
        products = multiply(torch.ones(rows, 520).bfloat16(), pack(weight))
        assert torch.equal(products, weight.float().sum(1).bfloat16().expand(rows, -1)), rows


@pytest.mark.parametrize(
    ("kind", "share"), [(usual, 0.76), (constant, 0.75), (nothing, 0.75), (pruned, 1.0), (patterns, 1.0)]
)
def test_usual_weights_are_read_in_three_quarters_of_their_size(
    kind: Callable[[int, int], Tensor], share: float
) -> None:
    weight = kind(320, 2048)
    assert num_bytes(pack(weight)) <= share * weight.nbytes
    assert num_bytes(pack(weight)) >= weight.nbytes * (0.75 if share < 1 else 1)


def test_the_share_of_bytes_is_that_of_all_weights() -> None:
    half, whole = pack(constant(32, 2048)), usual(32, 2048).float()  # the second as large as two of the first
    assert stored_share([half]) == 0.75
    assert stored_share([whole]) == stored_share([]) == 1
    assert stored_share([half, whole]) == pytest.approx((0.75 + 2) / 3)
