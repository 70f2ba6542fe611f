"""Families: which rows a model has, and how its `config.json` is read.

A new dense variant is a line in FAMILIES; see docs/adding-a-model.md.
"""

from __future__ import annotations

from mindgen.weights.families.baichuan import BAICHUAN
from mindgen.weights.families.biased import BLOOM, GPT2
from mindgen.weights.families.dense import DENSE, QK_NORM, QKV_BIAS
from mindgen.weights.families.experts import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from mindgen.weights.families.family import Family
from mindgen.weights.families.gemma import GEMMA, GEMMA2
from mindgen.weights.families.glm import CHATGLM, GLM, GLM4
from mindgen.weights.families.internlm import INTERNLM2
from mindgen.weights.families.phi import PHI3
from mindgen.weights.families.qwen1 import QWEN1
from mindgen.weights.rows import Row

_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", DENSE, kv_heads_default=True),
    "mistral": Family("MistralForCausalLM", DENSE, {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", DENSE + QKV_BIAS, _WINDOW, sliding="later"),
    "qwen3": Family("Qwen3ForCausalLM", DENSE + QK_NORM, {"head_dim": 128} | _WINDOW, sliding="later"),
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "phi3": PHI3,
    "glm": GLM,
    "glm4": GLM4,
    "chatglm": CHATGLM,
    "baichuan": BAICHUAN,
    "internlm2": INTERNLM2,
    "qwen": QWEN1,
    "bloom": BLOOM,
    "gpt2": GPT2,
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
