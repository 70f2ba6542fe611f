"""Families whose code is not part of transformers: judged by the transformers class that computes the same, and written
under the names and in the words of the original files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
_LLAMA = {"hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "rms_norm_eps", "vocab_size"}
_LLAMA |= {"tie_word_embeddings", "bos_token_id", "eos_token_id", "max_position_embeddings", "hidden_act"}


def write_original(folder: Path, model_type: str, model: Any) -> Path:
    """Writes a transformers model as the original code of a family would: `config.json` and one file of weights."""
    config, tensors = WRITERS[model_type](model.config, dict(model.state_dict()))
    config |= {"model_type": model_type, "torch_dtype": "float32", "use_cache": True, "auto_map": {"AutoConfig": "x.Y"}}
    folder.mkdir(parents=True)
    dtype = model.dtype
    save_file(
        {name: value.to(dtype).contiguous().clone() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def renamed(tensors: Tensors, *words: tuple[str, str]) -> Tensors:
    """The tensors with parts of their names replaced, in this order."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in words:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def packed(tensors: Tensors, parts: tuple[str, ...], target: str) -> Tensors:
    """The tensors with those of several modules, one after the other, in one."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        module = next((part for part in parts if f".{part}." in name), None)
        name = name.replace(f".{module}.", f".{target}.")
        found[name] = torch.cat([found[name], tensor]) if name in found else tensor
    return found


QKV = ("q_proj", "k_proj", "v_proj")


def rope_of(config: Any) -> dict[str, Any]:
    """A configuration with the rope's words, which transformers 5 keeps one deeper, among the others."""
    words = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | config.to_dict()
    return words | (words.get("rope_parameters") or {})


def _chatglm(config: Any, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    words = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "padded_vocab_size": config.vocab_size,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "rope_ratio": rope_of(config)["rope_theta"] / 10000,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "tie_word_embeddings": False,
    }
    tensors = renamed(
        packed(tensors, QKV, "query_key_value"),
        ("lm_head", "transformer.output_layer"),
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.layers", "transformer.encoder.layers"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("self_attn", "self_attention"),
        ("gate_up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
    )
    return words, tensors | {"transformer.rotary_pos_emb.inv_freq": torch.ones(config.head_dim // 4)}


def _baichuan(config: Any, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """What only some of the four sizes have is told by the judge's own configuration."""
    words = {name: getattr(config, name) for name in _LLAMA}
    if config._attn_implementation == ALIBI:
        words["model_max_length"] = words.pop("max_position_embeddings")
        words["gradient_checkpointing"] = False
        words["position_embedding_type"] = ALIBI  # the originals have 40 heads, by which they are known
    if getattr(config, "is_second", False):
        words["z_loss_weight"] = 0
    lengths = torch.linspace(0.3, 3.0, config.vocab_size)[:, None]  # of no consequence where the head is normalised
    head = tensors["lm_head.weight"] * (lengths if getattr(config, "is_second", False) else 1)
    return words, packed(tensors, QKV, "W_pack") | {"lm_head.weight": head}


def _internlm2(config: Any, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    words = {name: getattr(config, name) for name in _LLAMA | {"num_key_value_heads"}}
    words |= {"bias": False, "attn_implementation": "eager", "rope_theta": rope_of(config)["rope_theta"]}
    words["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    groups, width = config.num_key_value_heads, config.hidden_size
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts = [tensors.pop(f"{prefix}self_attn.{part}.weight").view(groups, -1, width) for part in QKV]
        tensors[f"{prefix}attention.wqkv.weight"] = torch.cat(parts, dim=1).view(-1, width)
    return words, renamed(
        tensors,
        ("lm_head", "output"),
        ("embed_tokens", "tok_embeddings"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
    )


def _qwen(config: Any, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    words = {name: getattr(config, name) for name in _LLAMA - {"rms_norm_eps", "hidden_act", "max_position_embeddings"}}
    words |= {
        "intermediate_size": 2 * config.intermediate_size,
        "layer_norm_epsilon": config.rms_norm_eps,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": 32768,
        "seq_length": config.max_position_embeddings,
        "rotary_emb_base": rope_of(config)["rope_theta"],
        "rotary_pct": 1.0,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "scale_attn_weights": True,
        "use_flash_attn": "auto",
    }
    return words, renamed(
        packed(tensors, QKV, "c_attn"),
        ("self_attn", "attn"),
        ("o_proj", "c_proj"),
        ("embed_tokens", "wte"),
        ("model.layers", "transformer.h"),
        ("model.norm", "transformer.ln_f"),
        ("model.", "transformer."),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("gate_proj", "w2"),
        ("up_proj", "w1"),
        ("down_proj", "c_proj"),
    )


WRITERS: dict[str, Callable[[Any, Tensors], tuple[dict[str, Any], Tensors]]] = {
    "chatglm": _chatglm,
    "baichuan": _baichuan,
    "internlm2": _internlm2,
    "qwen": _qwen,
}

# --- what transformers' classes lack ----------------------------------------------------------------------------------

ALIBI = "alibi"


def use_alibi(model: Any) -> None:
    """Makes a Llama attend as ALiBi says (Press et al. 2022) and turns its rotary embedding off."""
    from transformers import AttentionInterface

    AttentionInterface.register(ALIBI, alibi_attention)
    model.config._attn_implementation = ALIBI
    model.model.rotary_emb.inv_freq.zero_()


def alibi_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """softmax(q k / sqrt(d) + slope * (j - i)) v over keys j up to the query i, for one sequence without padding."""
    heads, count, length = query.shape[1], query.shape[2], key.shape[2]
    back = torch.arange(length) - torch.arange(length - count, length)[:, None]
    scores = query @ key.transpose(-1, -2) * scaling + slopes(heads)[:, None, None] * back
    scores = scores.masked_fill(back > 0, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def slopes(heads: int) -> Tensor:
    """2^(-8 k / n) for head k of n; with no power of two, those of the power below, then every other of the next."""
    below = 2 ** (heads.bit_length() - 1)
    first = [2 ** (-8 * k / below) for k in range(1, below + 1)]
    others = [2 ** (-8 * k / (2 * below)) for k in range(1, 2 * below + 1, 2)]
    return torch.tensor((first + others)[:heads])


def normalise_head(model: Any) -> None:
    """Rows of length one, as Baichuan 2 has them whatever its file says."""
    model.config.is_second = True
    model.lm_head.weight.data = nn.functional.normalize(model.lm_head.weight.data)
