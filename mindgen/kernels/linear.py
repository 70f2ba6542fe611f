"""Products with weights that lie in panels (cpu/panels.h): bfloat16, float32 sums, rounded once.

O output features, I input features, P panels of 32 output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindgen.kernels.library import kernel, unavailable

_WIDTH = 32  # outputs of a panel


def can_pack(weight: Tensor) -> bool:
    """Whether a weight [O, I] can be laid out in panels here: a CPU's bfloat16, and no panel left unfilled."""
    outputs, inputs = weight.shape
    fits = outputs % _WIDTH == 0 and inputs % 2 == 0 and weight.numel() > 0
    return fits and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and unavailable() is None


def pack(weight: Tensor) -> Tensor:
    """A weight [O, I] as panels [P, 1 + I / 2, 64], which only the kernels read. Most panels fill 3/4 of their room."""
    assert can_pack(weight), "ask `can_pack` first"
    outputs, inputs = weight.shape
    weight = weight.contiguous()
    panels = torch.empty(outputs // _WIDTH, 1 + inputs // 2, 2 * _WIDTH, dtype=weight.dtype)
    kernel("pack")(weight.data_ptr(), outputs, inputs, panels.data_ptr(), torch.get_num_threads())
    return panels


def unpack(panels: Tensor) -> Tensor:
    """The weight [O, I] of `pack`."""
    weight = panels.new_empty(sizes(panels))
    kernel("unpack")(panels.data_ptr(), *weight.shape, weight.data_ptr())
    return weight


def num_bytes(panels: Tensor) -> int:
    """How many bytes of memory a product with panels reads."""
    total = torch.zeros((), dtype=torch.int64)
    kernel("stored")(panels.data_ptr(), *sizes(panels), total.data_ptr())
    return int(total)


def multiply(inputs: Tensor, panels: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """[..., I] times panels, plus `bias` [O], plus `residual` [..., O] -> [..., O]; all bfloat16."""
    num_outputs, num_expected = sizes(panels)
    inputs = inputs.contiguous()
    *outer, num_inputs = inputs.shape
    assert num_inputs == num_expected and inputs.dtype is panels.dtype, "rows of another size or type"
    outputs = inputs.new_empty(*outer, num_outputs)
    if bias is not None:
        assert bias.shape == (num_outputs,) and bias.dtype is panels.dtype and bias.is_contiguous()
    if residual is not None:
        residual = residual.contiguous()
        assert residual.shape == outputs.shape and residual.dtype is panels.dtype
    rows = outputs.numel() // num_outputs
    # fmt: off
    kernel("linear")(
        inputs.data_ptr(), rows, num_inputs, panels.data_ptr(), num_outputs, _address(bias), _address(residual),
        outputs.data_ptr(), torch.get_num_threads(),
    )
    # fmt: on
    return outputs


def sizes(panels: Tensor) -> tuple[int, int]:
    """O and I of the weight in panels."""
    num_panels, room, _ = panels.shape
    return num_panels * _WIDTH, 2 * (room - 1)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
