"""What cpu/*.cpp are given in one piece: addresses and numbers that stay the same from call to call.

A structure knows addresses only: whoever fills one keeps the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

Kind = TypeVar("Kind", bound=ctypes.Structure)


def _fields(addresses: str, integers: str = "", floats: str = "") -> list[tuple[str, type]]:
    kinds = ((addresses, ctypes.c_void_p), (integers, ctypes.c_int64), (floats, ctypes.c_float))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class Context(ctypes.Structure):
    """`Context` of cpu/attention.h: the sequences of a step and how the cache lies."""

    _fields_ = _fields(
        "slots starts lengths tables slopes",
        "width sequences cache_block cache_token cache_group block_size groups head_dim threads",
        "scale softcap",
    )


class SelfAttention(ctypes.Structure):
    """`SelfAttention` of cpu/layer.cpp: the weights of one layer's attention, with the norm before it."""

    _fields_ = _fields(
        "norm qkv qkv_bias query_norm key_norm proj proj_bias epsilon",
        "has_offset hidden_size groups shared head_dim",
    )


class FeedForward(ctypes.Structure):
    """`FeedForward` of cpu/layer.cpp: the weights of one layer's MLP, with the norm before it."""

    _fields_ = _fields("norm up up_bias down down_bias epsilon", "has_offset hidden_size inner_size is_silu")


def filled(kind: type[Kind], tensors: Mapping[str, Tensor | None], **numbers: float) -> Kind:
    """A structure with the addresses of `tensors`, which the caller keeps."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    addresses = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    return kind(**addresses, **numbers)
