"""Rotary position embedding (Su et al. 2021) in the half-split layout of transformers, with its scaled variants.

T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mindgen.spec import ModelSpec, RopeScaling


class RotaryEmbedding:
    """Angles of positions: called with positions [T] it gives (cosine, signed sine), each [T, 1, D].

    The sine's first half is negated, as the rotation of a pair wants it.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        frequencies, self.scale = scaled_frequencies(spec)
        self.frequencies = frequencies.to(device)  # [D / 2], radians a token

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None, None] * self.frequencies
        cosine, sine = (angles.cos() * self.scale).to(self.dtype), (angles.sin() * self.scale).to(self.dtype)
        return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)


def rotate(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x_i, x_{i + D/2}) of heads [T, ..., D] by its angle."""
    shape = (heads.shape[0], *(1 for _ in heads.shape[1:-1]), heads.shape[-1])
    cosine, sine = (part.view(shape) for part in rope)
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)


def scaled_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    """The frequencies [D / 2] of a model in float32 and the factor on cosine and sine."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, spec)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, a linear blend between."""
    assert scaling.original_max_positions and scaling.low_freq_factor and scaling.high_freq_factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScaling, spec: ModelSpec) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): a ramp over dimensions between the two given numbers of turns."""
    assert scaling.original_max_positions and scaling.beta_fast and scaling.beta_slow

    def dimension(turns: float) -> float:
        ratio = math.log(scaling.original_max_positions / (turns * 2 * math.pi))  # type: ignore[operator]
        return spec.head_dim * ratio / (2 * math.log(spec.rope_theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), spec.head_dim - 1)
    ramp = (torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    attention = scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)
    return stretched * frequencies / scaling.factor + (1 - stretched) * frequencies, attention
