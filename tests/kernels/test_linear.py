"""Products with weights in panels: against exact ones, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mindgen.kernels.library import unavailable
from mindgen.kernels.linear import can_pack, multiply, pack, unpack

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

# Every height of a group, the ends of groups, of what counts as few rows, and of a slab.
ROWS = (*range(14), 24, 25, 48, 49, 100, 576, 577)
SHAPES = ((32, 2), (64, 66), (96, 514), (160, 2048))  # outputs, inputs: odd numbers of panels and of parts


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_keeps_every_number(shape: tuple[int, int]) -> None:
    weight = numbers(*shape)
    assert torch.equal(unpack(pack(weight)), weight)
    assert torch.equal(unpack(pack(weight.t().contiguous().t())), weight)  # whatever its strides


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_exact_but_for_the_last_rounding(rows: int, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    x, weight, bias, residual = numbers(rows, inputs), numbers(*shape), numbers(outputs), numbers(rows, outputs)
    panels, products = pack(weight), x.double() @ weight.double().t()
    sizes = x.double().abs() @ weight.double().abs().t()  # float32 sums of n numbers err by at most n / 2^24 of these
    for added, other in ((None, None), (bias, None), (None, residual), (bias, residual)):
        exact = products + sum(part.double() for part in (added, other) if part is not None)
        error = (multiply(x, panels, added, other).double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 + (sizes + 8) * inputs * 2**-24).all()


def test_a_row_has_the_same_bits_in_any_company_and_with_any_number_of_threads() -> None:
    x, panels = numbers(600, 1030), pack(numbers(352, 1030))
    before = torch.get_num_threads()
    together = multiply(x, panels)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in (1, 2, 3, 7, 13, 30, 64, 600):
                assert torch.equal(multiply(x[-count:], panels), together[-count:]), (threads, count)
    finally:
        torch.set_num_threads(before)


def test_rows_may_be_anywhere() -> None:
    x, panels = numbers(6, 4, 64), pack(numbers(32, 64))
    assert multiply(x, panels).shape == (6, 4, 32)
    assert torch.equal(multiply(x[:, 1], panels), multiply(x, panels)[:, 1])
    residual = numbers(32, 4, 6).transpose(0, 2)
    assert torch.equal(multiply(x, panels, None, residual), multiply(x, panels, None, residual.contiguous()))


def test_infinity_and_nan_stay_in_their_row() -> None:
    x, panels = numbers(3, 64), pack(numbers(32, 64))
    clean = multiply(x, panels)
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    assert torch.equal(multiply(x, panels)[0], clean[0])
    assert multiply(x, panels)[1].isnan().all() and not multiply(x, panels)[2].isfinite().any()


def test_tensors_of_other_types_and_sizes_are_refused() -> None:
    x, panels = numbers(3, 64), pack(numbers(32, 64))
    bias, residual = numbers(32), numbers(3, 32)
    wrong = (
        (x[:, :62], None, None),
        (x.float(), None, None),
        (x, bias.float(), None),
        (x, bias[:16], None),
        (x, bias.repeat_interleave(2)[::2], None),
        (x, None, residual.float()),
        (x, None, residual[:2]),
    )
    for inputs, added, other in wrong:
        with pytest.raises(AssertionError):
            multiply(inputs, panels, added, other)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(33, 4, dtype=torch.bfloat16),
        torch.zeros(32, 3, dtype=torch.bfloat16),
        torch.zeros(0, 4, dtype=torch.bfloat16),
        torch.zeros(32, 4),
        torch.zeros(32, 4, dtype=torch.bfloat16, device="meta"),
    ],
    ids=["half a panel", "half a pair", "nothing", "float32", "another device"],
)
def test_what_does_not_fill_panels_is_left_to_others(weight: Tensor) -> None:
    assert not can_pack(weight)
    with pytest.raises(AssertionError):
        pack(weight)
