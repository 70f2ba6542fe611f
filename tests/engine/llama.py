"""A tiny random Llama of transformers, the judge of tokens and log-probabilities."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 61


def tiny_llama() -> Any:
    """Its logits are spread enough for greedy answers that vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.25, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    return model


@torch.inference_mode()
def last_logits(model: Any, contexts: list[list[int]]) -> torch.Tensor:
    """[contexts, VOCAB]; contexts of any lengths, one at a time where they differ."""
    if len({len(context) for context in contexts}) == 1:
        logits: torch.Tensor = model(torch.tensor(contexts)).logits[:, -1]
        return logits
    return torch.cat([last_logits(model, [context]) for context in contexts])
