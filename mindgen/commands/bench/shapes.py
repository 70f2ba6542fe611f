"""Shapes of published models, by name or by their config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindgen.spec import ModelSpec
from mindgen.weights.config_json import spec_from_config
from mindgen.weights.huggingface import read_json

_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)
_SHAPES: dict[str, tuple[Any, ...]] = {
    "tinyllama-1.1b": ("llama", 22, 2048, 32, 4, 64, 5632, 32000, 2048, 1e-5, 1e4, False),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768, 1e-6, 1e6, True),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e-6, 1e6, False),
    "mistral-7b-v0.3": ("mistral", 32, 4096, 32, 8, 128, 14336, 32768, 32768, 1e-5, 1e6, False),
}


def find_shape(name: str, dtype: str) -> ModelSpec:
    """The spec of a known shape, or of a config.json (the file or its folder).

    `dtype` is what the weights become where the file says nothing. ValueError for a name that is neither.
    """
    if name in _SHAPES:
        config = dict(zip(_FIELDS, _SHAPES[name], strict=True))
        return spec_from_config(config | {"sliding_window": None}, dtype, name)
    path = shape_file(name)
    if not path.exists():
        raise ValueError(
            f"--random-weights {name} is no config.json, no folder with one, and no known shape; "
            f"known are {', '.join(_SHAPES)}"
        )
    config = read_json(path)
    stated = config.get("dtype") or config.get("torch_dtype")
    return spec_from_config(config, None if stated else dtype, str(path))


def shape_file(name: str) -> Path:
    """The config.json that `name` means if it is no known shape: the file, or in its folder."""
    path = Path(name)
    return path / "config.json" if path.is_dir() else path
