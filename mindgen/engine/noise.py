"""The noise of a draw: a hash of (seed, position, token id), so that there is no state and no order of draws.

Legend: G rows, V vocabulary, M tokens that are still in question.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [G, M] float64 for seeds [G], positions [G] and token ids [G, M], all int64.

    Each row starts a splitmix64 sequence (Steele, Lea, Flood 2014) at a hash of seed and position; token id i takes
    its (i + 1)-th number, of which 52 bits make a float strictly between 0 and 1.
    """
    bits = _mix((ids + 1).mul_(_GOLDEN).add_(_start(seed, position)))
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def arrival_times(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """exp(-gumbel_noise) of the token ids 0 to V - 1 [G, V], float32, which are exponentially distributed.

    Within a share of 1e-5 of the exact number, or too small where that is above 6.9, as one in a thousand is.
    """
    times = torch.empty(len(seed), vocab, device=seed.device)
    start, first = _start(seed, position), 1
    for some in times.split(max(1, _AT_A_TIME // len(seed)) if seed.device.type == "cpu" else vocab, dim=1):
        last = first + some.shape[1]
        bits = _mix(torch.arange(first, last, device=seed.device).mul_(_GOLDEN) + start)
        rest = bits.bitwise_not_().bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1)  # 1 - uniform, unrounded
        some.copy_(rest).add_(0.5).mul_(-(2.0**-52)).clamp_(min=-_MOST_MISSING).log1p_().neg_()
        first = last
    return times


def _start(seed: Tensor, position: Tensor) -> Tensor:
    return _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)[:, None]


def _signed(number: int) -> int:
    return number - (1 << 64)


_AT_A_TIME = 1 << 15  # numbers whose temporaries stay in the cache of a CPU
_MOST_MISSING = 1 - 2.0**-10  # nearer to 1, float32 would leave too few digits of the logarithm
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(state: Tensor) -> Tensor:
    """splitmix64's finaliser, in place; int64 products wrap around."""
    state.bitwise_xor_(_shift(state, 30)).mul_(_FIRST)
    state.bitwise_xor_(_shift(state, 27)).mul_(_SECOND)
    return state.bitwise_xor_(_shift(state, 31))


def _shift(state: Tensor, count: int) -> Tensor:
    """To the right, filling with zeros."""
    return (state >> count).bitwise_and_((1 << (64 - count)) - 1)
