"""Half a layer in one call, as cpu/layer.cpp computes it: the same bits as the functions beside it, one after another.

T tokens, G KV heads, Q query heads a KV head, D head_dim, H hidden size, F inner size of the MLP, R elements of a head
that are turned. Weights are panels, as `kernels.linear.pack` makes them, everything else is bfloat16 as it is.
"""

from __future__ import annotations

from ctypes import addressof
from typing import NamedTuple

import torch
from torch import Tensor

from mindgen.kernels.library import kernel
from mindgen.kernels.linear import sizes
from mindgen.kernels.structures import Context, FeedForward, SelfAttention, filled

_MOST_TOKENS = 576  # that an MLP takes at a time, as products do


class Normed(NamedTuple):
    """What an RMS norm has: weight [H], epsilon as one float32, and whether 1 is added to the weight."""

    weight: Tensor
    epsilon: Tensor
    has_offset: bool


class Product(NamedTuple):
    """Panels of a weight [O, I] and a bias [O]."""

    panels: Tensor
    bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int]:
        """O and I."""
        return sizes(self.panels)


class AttentionHalf:
    """Norm, qkv [G (Q + 2) D, H], norms of queries and keys, rotation, attention, proj [H, G Q D].

    Keeps its tensors. heads: G and D.
    """

    def __init__(
        self, norm: Normed, qkv: Product, head_norms: tuple[Tensor, Tensor] | None, proj: Product, groups: int
    ):
        query_norm, key_norm = head_norms or (None, None)
        self._tensors = _kept(
            norm=norm.weight, qkv=qkv.panels, qkv_bias=qkv.bias, query_norm=query_norm, key_norm=key_norm,
            proj=proj.panels, proj_bias=proj.bias, epsilon=norm.epsilon,
        )  # fmt: skip
        (heads, hidden), (outputs, queries) = qkv.sizes, proj.sizes
        assert hidden == outputs and (heads - queries) % (2 * groups) == 0, "products that do not follow each other"
        head_dim = (heads - queries) // (2 * groups)
        shared = queries // (groups * head_dim)
        self.heads = groups, head_dim
        numbers = {"hidden_size": hidden, "groups": groups, "shared": shared, "head_dim": head_dim}
        self._weights = filled(SelfAttention, self._tensors, has_offset=norm.has_offset, **numbers)
        self._size = hidden
        self._kernel = kernel("self_attention")

    def __call__(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        turns: tuple[Tensor, Tensor, bool] | None,
        context: Context,
        cache: tuple[Tensor, Tensor],
        window: int,
    ) -> Tensor:
        """hidden [T, H] -> [T, H], plus `residual`. turns: cosine and sine [T, 1, R], and whether partners are
        neighbours; cache: keys and values of the layer, as `context` says; window: 0 for none."""
        tokens, outputs = hidden.shape[0], _outputs(hidden, residual, self._size)
        cosine, sine, turned, interleaved = (None, None, 0, False) if turns is None else _turned(*turns, tokens)
        keys, values = cache
        # fmt: off
        self._kernel(
            addressof(self._weights), addressof(context), hidden.data_ptr(), tokens, cosine, sine, turned,
            interleaved, keys.data_ptr(), values.data_ptr(), window, _address(residual), outputs.data_ptr(),
        )
        # fmt: on
        return outputs


class FeedForwardHalf:
    """Norm, gate and up [2 F, H], the activation (of elementwise.GATES), down [H, F]. Keeps its tensors."""

    def __init__(self, norm: Normed, up: Product, activation: str, down: Product):
        self._tensors = _kept(
            norm=norm.weight, up=up.panels, up_bias=up.bias, down=down.panels, down_bias=down.bias,
            epsilon=norm.epsilon,
        )  # fmt: skip
        (gates, hidden), (outputs, inner) = up.sizes, down.sizes
        assert hidden == outputs and gates == 2 * inner, "products that do not follow each other"
        numbers = {"hidden_size": hidden, "inner_size": inner, "is_silu": activation == "silu"}
        self._weights = filled(FeedForward, self._tensors, has_offset=norm.has_offset, **numbers)
        self._size = hidden
        self._kernel = kernel("feed_forward")

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """hidden [T, H] -> [T, H], plus `residual`."""
        tokens, outputs = hidden.shape[0], _outputs(hidden, residual, self._size)
        most = -(-tokens // max(1, -(-tokens // _MOST_TOKENS)))
        # fmt: off
        self._kernel(
            addressof(self._weights), hidden.data_ptr(), tokens, _address(residual), most, outputs.data_ptr(),
            torch.get_num_threads(),
        )
        # fmt: on
        return outputs


def _kept(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """Tensors whose memory stays, also when a parameter is given other data."""
    return {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}


def _outputs(hidden: Tensor, residual: Tensor | None, size: int) -> Tensor:
    assert hidden.dtype is torch.bfloat16 and hidden.shape[1] == size and hidden.is_contiguous()
    assert residual is None or (residual.shape == hidden.shape and residual.is_contiguous())
    return torch.empty_like(hidden)


def _turned(cosine: Tensor, sine: Tensor, interleaved: bool, tokens: int) -> tuple[int, int, int, bool]:
    assert cosine.shape == sine.shape == (tokens, 1, cosine.shape[2]) and cosine.dtype is torch.bfloat16
    assert cosine.is_contiguous() and sine.is_contiguous()
    return cosine.data_ptr(), sine.data_ptr(), cosine.shape[2], interleaved


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
