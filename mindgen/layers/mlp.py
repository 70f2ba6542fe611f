"""The feed-forward block, with a gate or without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindgen.kernels import elementwise
from mindgen.layers.linear import ColumnParallelLinear, RowParallelLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


_IN_CACHE = 1 << 16  # float64 numbers of which a few arrays stay in a second-level cache


class MLP(nn.Module):
    """[T, hidden] -> [T, hidden]: fc2(act(gate(x)) * up(x)), or fc2(act(fc1(x))) without a gate.

    This rank's gate and up lie one after the other in linear_fc1.
    """

    def __init__(
        self, linear_fc1: ColumnParallelLinear, linear_fc2: RowParallelLinear, activation: str, is_gated: bool
    ):
        super().__init__()
        self.linear_fc1 = linear_fc1
        self.linear_fc2 = linear_fc2
        self._activation = activation
        self._is_gated = is_gated

    @property
    def gate(self) -> str | None:
        """The activation of the gate, if there is one."""
        return self._activation if self._is_gated else None

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """The block's outputs, plus `residual`."""
        return self.linear_fc2(self._inner(hidden), residual)

    def part(self, hidden: Tensor) -> Tensor:
        """This rank's part of the outputs, which summed over those that share the block are all of it."""
        return self.linear_fc2.sum_here(self._inner(hidden))

    def _inner(self, hidden: Tensor) -> Tensor:
        inner = self.linear_fc1(hidden)
        if not self._is_gated:
            return activated(inner, self._activation)
        if self._activation in elementwise.GATES and elementwise.runs_on(inner):
            return elementwise.gated(inner, self._activation)
        return gated(inner, self._activation)


def gated(gate_and_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of gate_and_up [T, 2 F] -> [T, F]."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return activated(gate, activation).mul_(up)


def activated(inputs: Tensor, activation: str) -> Tensor:
    """activation(inputs) [T, F].

    On a CPU the last elements of a row are computed apart from the others and rounded differently, and which these are
    depends on the layout. So float32 is computed in float64 there, and rounded once.
    """
    if inputs.dtype != torch.float32 or inputs.device.type != "cpu":
        return ACTIVATIONS[activation](inputs)
    outputs = torch.empty(inputs.shape)
    rows = max(1, _IN_CACHE // inputs.shape[-1])
    for some, result in zip(inputs.split(rows), outputs.split(rows), strict=True):
        result.copy_(ACTIVATIONS[activation](some.double()))
    return outputs
