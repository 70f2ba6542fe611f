"""Tiny checkpoints of every family, initialised so that every feature matters, and the transformers models they are of.

transformers writes them, or, where it does not know the family, originals.py.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.originals import normalise_head, use_alibi, write_original

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 5,  # uneven over two stages
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 331,  # padded at every tensor parallel size above one
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,  # large enough to be seen
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A family with the features that a published model of it has.

    architecture: of the judge in transformers; model: its class, where that name does not follow.
    original: the family in whose own words the judge's weights are written, and changes: what makes the judge like it.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    original: str = ""
    changes: tuple[Callable[[Any], None], ...] = ()


# In the words of transformers 4, which transformers 5 reads too, and writes in its own.
THETA = {"rope_theta": 700.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
}
PARTIAL_ROPE = THETA | {"partial_rotary_factor": 0.5}
TWELVE_HEADS = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12}  # no power of two
EXPERTS = THETA | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.3 * number for number in range(8)],
    "long_factor": [2.0 + number for number in range(8)],
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 3.0}


def _scaled(rope: dict[str, Any], theta: float = 500.0) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": rope}


CASES = {
    "llama2": Case("Llama", {"num_key_value_heads": 4} | _scaled(LINEAR_ROPE)),
    "llama31": Case("Llama", _scaled(LLAMA3_ROPE)),
    "llama32": Case("Llama", _scaled(LLAMA3_ROPE | {"factor": 32.0}) | {"tie_word_embeddings": True}),
    "mistral": Case("Mistral", {"sliding_window": 24, "head_dim": 32, "rope_theta": 700.0}),
    "qwen2": Case("Qwen2", {"tie_word_embeddings": True} | _scaled(YARN_ROPE)),
    "qwen25": Case("Qwen2", {"rope_theta": 700.0}),
    "gemma": Case("Gemma", {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "gemma2": Case(
        "Gemma2",
        {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.5}
        | {"final_logit_softcapping": 4.0, "tie_word_embeddings": True, "rope_theta": 700.0},
    ),
    "phi3": Case("Phi3", {"num_key_value_heads": 4, "sliding_window": 24} | PARTIAL_ROPE),
    "phi35": Case(
        "Phi3",
        {"num_key_value_heads": 4, "original_max_position_embeddings": 64}  # some prompts are longer, some get longer
        | _scaled(LONG_ROPE, 700.0),
    ),
    "glm": Case("Glm", {"head_dim": 32, "attention_bias": True} | PARTIAL_ROPE),
    "glm_edge": Case(
        "Glm",
        {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True} | THETA | {"partial_rotary_factor": 1.0},
    ),
    "glm4": Case("Glm4", {"head_dim": 32, "attention_bias": True} | PARTIAL_ROPE),
    "glm4_32b": Case("Glm4", {"head_dim": 32, "attention_bias": False} | PARTIAL_ROPE),
    "bloom": Case("Bloom", {"n_layer": 5, "n_head": 4, "layer_norm_epsilon": 1e-2, "tie_word_embeddings": True}),
    "gpt2": Case(
        "GPT2",
        {"n_layer": 5, "n_head": 4, "n_embd": 64, "n_positions": 256, "layer_norm_epsilon": 1e-2}
        | {"tie_word_embeddings": True},
        model="GPT2LMHeadModel",
    ),
    "qwen3": Case("Qwen3", {"head_dim": 32, "rope_theta": 700.0}),
    "mixtral": Case("Mixtral", THETA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": Case("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [3]}),
    "qwen3_moe": Case("Qwen3Moe", EXPERTS | {"head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "chatglm": Case(
        "Glm",
        {"head_dim": 32, "attention_bias": True} | PARTIAL_ROPE | {"rope_theta": 5000.0},
        original="chatglm",
    ),
    "baichuan": Case("Llama", {"num_key_value_heads": 4}, original="baichuan"),
    "baichuan2": Case("Llama", {"num_key_value_heads": 4}, original="baichuan", changes=(normalise_head,)),
    "baichuan_13b": Case("Llama", TWELVE_HEADS, original="baichuan", changes=(use_alibi,)),
    "baichuan2_13b": Case("Llama", TWELVE_HEADS, original="baichuan", changes=(use_alibi, normalise_head)),
    "internlm2": Case("Llama", {"rope_theta": 700.0}, original="internlm2"),
    "qwen": Case("Qwen2", {"num_key_value_heads": 4, "rope_theta": 700.0}, original="qwen"),
}


def _shape(case: Case) -> dict[str, Any]:
    """The shape in Llama's words, or what is left of it where the class has its own."""
    own = "n_layer" in case.config
    return {name: value for name, value in SHAPE.items() if not own or name in _COMMON}


_COMMON = ("hidden_size", "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def make_model(name: str) -> Any:
    """A transformers model in float32 whose logits spread by about 2, with norms and biases away from the identity."""
    import transformers

    case = CASES[name]
    config = getattr(transformers, f"{case.architecture}Config")(
        **deepcopy(_shape(case) | case.config)
    )  # some write into it
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, case.model or f"{case.architecture}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter_name.endswith("bias"):
            parameter.data = 0.5 * noise
        elif parameter.dim() == 1:  # a norm
            parameter.data = 1 + 0.3 * noise
        else:
            parameter.data = noise * (2.0 / parameter.shape[-1] ** 0.5)
    for change in case.changes:
        change(model)
    return model


def save_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "150KB") -> Path:
    """Writes the model of a case as a Hugging Face folder, of several files where transformers writes it."""
    if CASES[name].original:
        return write_original(folder, CASES[name].original, make_model(name).to(dtype))
    make_model(name).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def prompts(count: int, vocab_size: int = 331) -> list[list[int]]:
    """Prompts of different lengths, the first beyond the original context of the scaled ropes."""
    generator = torch.Generator().manual_seed(3)
    lengths = [70, 3, 41, 1, 18, 50][:count]
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
