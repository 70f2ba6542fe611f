"""Families: which rows a model has, and how its `config.json` is read.

A new dense variant is a line in FAMILIES; see docs/adding-a-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mindgen.weights.families.dense import DENSE, QK_NORM, QKV_BIAS
from mindgen.weights.rows import Row


@dataclass(frozen=True)
class Family:
    """A tuple of rows, and the parts of transformers' configuration that are particular to the family.

    architecture: the class name in `architectures`.
    defaults: values that the format itself defines for fields that `config.json` leaves out.
    qkv_bias, qk_norm: what Megatron's `args` call `add_qkv_bias` and `qk_layernorm`.
    """

    architecture: str
    rows: tuple[Row, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False


_NO_WINDOW = {"use_sliding_window": False}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", DENSE),
    "mistral": Family("MistralForCausalLM", DENSE, {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", DENSE + QKV_BIAS, _NO_WINDOW, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", DENSE + QK_NORM, {"head_dim": 128} | _NO_WINDOW, qk_norm=True),
}


def rows_of(family: str) -> tuple[Row, ...]:
    """The rows of a family; ValueError names the known ones."""
    return find_family(family).rows


def find_family(name: object) -> Family:
    """A family by transformers' `model_type`."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"model type {name!r} is not supported; mindgen knows {', '.join(FAMILIES)}. "
            "docs/adding-a-model.md tells how to add one"
        )
    return FAMILIES[name]
