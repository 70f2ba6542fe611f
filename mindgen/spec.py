"""What a model is: the few numbers that a checkpoint states and everything else follows from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
_LARGEST = 1 << 31  # a size beyond this is a broken file, not a model
_GREATEST = 1e15  # and so is a factor beyond this


def _flag(*names: str, default: Any = ...) -> Any:
    """A field and the Megatron flags that state the same fact in an existing script."""
    metadata = {"flags": names}
    return field(metadata=metadata) if default is ... else field(metadata=metadata, default=default)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the original context.

    `kind` is `linear`, `llama3` or `yarn`, as in transformers' `rope_parameters`. `original_max_positions` is in
    tokens. `low_freq_factor` and `high_freq_factor` belong to `llama3`; the other fields to `yarn` (Peng et al. 2023),
    where an `attention_factor` of None means 0.1 ln(factor) + 1.
    """

    kind: str = _flag("--rope-scaling-type")
    factor: float = _flag("--rope-scaling-factor")
    original_max_positions: int | None = _flag(
        "--original-max-position-embeddings", "--rope-scaling-original-max-position-embeddings", default=None
    )
    low_freq_factor: float | None = _flag("--low-freq-factor", default=None)
    high_freq_factor: float | None = _flag("--high-freq-factor", default=None)
    beta_fast: float | None = _flag("--rope-scaling-beta-fast", default=None)
    beta_slow: float | None = _flag("--rope-scaling-beta-slow", default=None)
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        needed = {
            "linear": ("factor",),
            "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "original_max_positions", "beta_fast", "beta_slow"),
        }
        if self.kind not in needed:
            raise ValueError(f"rope scaling type {self.kind!r} is not implemented; mindgen has {', '.join(needed)}")
        missing = [name for name in needed[self.kind] if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"rope scaling {self.kind!r} needs {', '.join(missing)}, which the checkpoint does not state"
            )
        for item in fields(self):
            if item.name not in ("kind", "original_max_positions"):
                _check_number(f"rope scaling {item.name}", getattr(self, item.name), optional=True)
        if self.original_max_positions is not None:
            _check_size("rope scaling original_max_positions", self.original_max_positions)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"rope scaling low_freq_factor {low} must be below high_freq_factor {high}")


@dataclass(frozen=True)
class ModelSpec:
    """What a model is. Sizes are in elements, `max_positions` and `sliding_window` in tokens.

    `vocab_size` is the true size: padding belongs to a layout, not to the model. `dtype` is how the weights are stored.
    Raises ValueError for sizes that no model has and for heads that do not divide.
    """

    family: str = _flag()
    num_layers: int = _flag("--num-layers")
    hidden_size: int = _flag("--hidden-size")
    num_heads: int = _flag("--num-attention-heads")
    num_kv_heads: int = _flag("--num-query-groups")
    head_dim: int = _flag("--kv-channels")
    ffn_size: int = _flag("--ffn-hidden-size")
    vocab_size: int = _flag("--vocab-size")
    max_positions: int = _flag("--max-position-embeddings")
    norm_epsilon: float = _flag("--norm-epsilon")
    rope_theta: float = _flag("--rotary-base")
    rope_scaling: RopeScaling | None = _flag()
    tie_embeddings: bool = _flag("--untie-embeddings-and-output-weights")
    dtype: str = _flag()
    sliding_window: int | None = _flag("--sliding-window", default=None)

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.type == "int":
                _check_size(item.name, getattr(self, item.name))
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window)
        _check_number("norm_epsilon", self.norm_epsilon)
        _check_number("rope_theta", self.rope_theta)
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be above 1")
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"tie_embeddings is {self.tie_embeddings!r}; it must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs, so it must be even")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not supported; weights may be stored as {', '.join(DTYPES)}")


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {_LARGEST - 1}")


def _check_number(name: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _GREATEST:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0 and below {_GREATEST:.0e}")
