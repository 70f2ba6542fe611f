"""Tiny checkpoints of every family, written by transformers and initialised so that every feature matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
    """A family with the features that a published model of it has."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}

CASES = {
    "llama2": Case("Llama", {"num_key_value_heads": 4, "rope_parameters": LINEAR_ROPE}),
    "llama31": Case("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama32": Case("Llama", {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}),
    "mistral": Case("Mistral", {"sliding_window": 24, "head_dim": 32, "rope_parameters": {"rope_theta": 700.0}}),
    "qwen2": Case("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    "qwen25": Case("Qwen2", {"rope_parameters": {"rope_theta": 700.0}}),
    "qwen3": Case("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_theta": 700.0}}),
}


def make_model(name: str) -> Any:
    """A transformers model in float32 whose logits spread by about 2, with norms and biases away from the identity."""
    import transformers

    case = CASES[name]
    config = getattr(transformers, f"{case.architecture}Config")(**SHAPE | case.config)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.architecture}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in parameter_name:
            parameter.data = 1 + 0.3 * noise
        elif parameter_name.endswith("bias"):
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise * (2.0 / parameter.shape[-1] ** 0.5)
    return model


def save_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "150KB") -> Path:
    """Writes the model of a case as a Hugging Face folder of several files."""
    make_model(name).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def prompts(count: int, vocab_size: int = 331) -> list[list[int]]:
    """Prompts of different lengths, the first beyond the original context of the scaled ropes."""
    generator = torch.Generator().manual_seed(3)
    lengths = [70, 3, 41, 1, 18, 50][:count]
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
