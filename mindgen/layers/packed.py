"""Weights laid out once, at load, as the CPU's matrix kernels read them: ours for bfloat16, else oneDNN's.

`F.linear` lays a weight out anew in every call, which costs more than half of the memory bandwidth at a few rows. This
is the one place that calls torch's oneDNN ops. They are private to torch, so a small case is tried first; where they
are missing or differ from `F.linear`, weights stay as they are.

O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from mindgen.kernels import linear as panels

_ROWS_EXPECTED = 8  # fp32 kernels differ in layout: that for one row is slow for more, this one serves both


def packed(weight: Tensor) -> Tensor:
    """A weight [O, I] in the layout of `linear`, or itself where it cannot be packed.

    A packed tensor keeps its dtype, and `plain` gives the weight back, but it cannot be sliced.
    """
    if panels.can_pack(weight):
        return panels.pack(weight)
    if weight.device.type != "cpu" or not can_pack(weight.dtype):
        return weight
    return _pack(weight.contiguous())


def plain(weight: Tensor) -> Tensor:
    """The weight [O, I] of which `packed` made this."""
    if _lies_in_panels(weight):
        return panels.unpack(weight)
    return weight.to_dense() if weight.is_mkldnn else weight


def stored_share(weights: Iterable[Tensor]) -> float:
    """Of the bytes of these weights, packed or not, the part that is read when all are multiplied with; 1 of none."""
    read = whole = 0
    for weight in weights:
        if _lies_in_panels(weight):
            read += panels.num_bytes(weight)
            whole += prod(panels.sizes(weight)) * weight.itemsize
        else:
            read, whole = read + weight.nbytes, whole + weight.nbytes
    return read / whole if whole else 1.0


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """[..., I] -> [..., O]: `inputs` times `weight` (packed or not), plus `bias` [O], plus `residual` [..., O]."""
    if _lies_in_panels(weight):
        return panels.multiply(inputs, weight, bias, residual)
    if inputs.dtype is torch.float32 and 0 < inputs.numel() // inputs.shape[-1] < _fewest(weight):
        outputs = _in_company(inputs, weight, bias)
        return outputs if residual is None else outputs + residual
    if not weight.is_mkldnn:
        outputs = F.linear(inputs, weight, bias)
        return outputs if residual is None else outputs + residual
    if residual is None:
        return _multiply(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, weight, bias, "add")


def _fewest(weight: Tensor) -> int:
    """How many rows of float32 a CPU computes as it computes many: with fewer it adds in other orders."""
    return 1 if weight.device.type != "cpu" else 2 if weight.is_mkldnn else 4


def _in_company(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1])
    outputs = linear(F.pad(rows, (0, 0, 0, _fewest(weight) - len(rows))), weight, bias)
    return outputs[: len(rows)].view(*inputs.shape[:-1], -1)


def _lies_in_panels(weight: Tensor) -> bool:
    return weight.dim() == 3


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU multiplies packed weights of `dtype` as `F.linear` multiplies plain ones."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 32), (48, 32), (48,), (3, 48))
    )
    close = partial(torch.allclose, rtol=4 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)
    try:
        tight = _pack(weight)
        alone, together = linear(inputs[:1], tight), linear(inputs, tight, bias, residual)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # no such op, no kernel, other arguments
        return False
    return close(alone, F.linear(inputs[:1], weight)) and close(together, F.linear(inputs, weight, bias) + residual)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED)


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")
