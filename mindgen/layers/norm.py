"""RMSNorm (Zhang and Sennrich 2019), computed in float32 and rounded before the weight, as transformers does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mindgen.layers.linear import empty_parameter
from mindgen.weights.rows import Row


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension."""

    def __init__(self, row: Row, sizes: dict[str, int], epsilon: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = empty_parameter(row, sizes, dtype, device)
        self._epsilon = torch.tensor(epsilon, dtype=torch.float32, device=device)

    def forward(self, inputs: Tensor) -> Tensor:
        wide = inputs.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / inputs.shape[-1]).rsqrt_()
        return (wide * scale).to(inputs.dtype) * self.weight
