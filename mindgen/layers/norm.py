"""Norms over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindgen.kernels import elementwise
from mindgen.kernels.layer import Normed
from mindgen.layers.linear import empty_parameter
from mindgen.spec import ModelSpec
from mindgen.weights.rows import Row


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019), or * (1 + weight) with an offset.

    Computed in float32 and rounded before the weight, as transformers does; with an offset rounded once, as Gemma's
    own code does.
    """

    def __init__(self, row: Row, sizes: dict[str, int], spec: ModelSpec, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = empty_parameter(row, sizes, dtype, device)
        self._epsilon = torch.tensor(spec.norm_epsilon, dtype=torch.float32, device=device)
        self._has_offset = spec.norm_offset

    @property
    def numbers(self) -> Normed:
        """What it has, for kernels that compute it with what follows."""
        return Normed(self.weight, self._epsilon, self._has_offset)

    def forward(self, inputs: Tensor) -> Tensor:
        if elementwise.runs_on(inputs):
            return elementwise.rms_norm(inputs, self.weight, self._epsilon, self._has_offset)
        return rms_norm(inputs, self.weight, self._epsilon, self._has_offset)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias (Ba et al. 2016)."""

    def __init__(
        self, row: Row, bias: Row, sizes: dict[str, int], spec: ModelSpec, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        self.weight = empty_parameter(row, sizes, dtype, device)
        self.bias = empty_parameter(bias, sizes, dtype, device)
        self._epsilon = spec.norm_epsilon

    def forward(self, inputs: Tensor) -> Tensor:
        return F.layer_norm(inputs, self.weight.shape, self.weight, self.bias, self._epsilon)


def rms_norm(inputs: Tensor, weight: Tensor, epsilon: Tensor, has_offset: bool) -> Tensor:
    """What `RMSNorm` computes: inputs [..., H], weight [H], and epsilon a float32 on their device."""
    wide = inputs.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(epsilon, length, length, value=1 / inputs.shape[-1]).rsqrt_()
    if has_offset:
        return (wide * scale * (1 + weight.float())).to(inputs.dtype)
    return (wide * scale).to(inputs.dtype) * weight


Norm = RMSNorm | LayerNorm
