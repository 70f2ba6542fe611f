"""Norms over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, inputs: Tensor) -> Tensor:
        wide = inputs.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / inputs.shape[-1]).rsqrt_()
        if self._has_offset:
            return (wide * scale * (1 + self.weight.float())).to(inputs.dtype)
        return (wide * scale).to(inputs.dtype) * self.weight


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


Norm = RMSNorm | LayerNorm
