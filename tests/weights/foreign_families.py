"""Megatron directories of kinds of models other than Llama, as MindSpeed-LLM writes them: plain loops, and none of
mindgen's code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.weights.foreign import Style, columns_of, save_shard, vocabulary_of

Tensors = dict[str, Tensor]


def write_family(path: Path, family: str, config: dict[str, Any], tensors: Tensors, style: Style) -> Path:
    """Writes a checkpoint of five layers from Hugging Face's tensors; returns the folder of its iteration.

    config: sizes in Llama's words, as foreign.py has them.
    """
    layer_of, ends_of = WRITERS[family]
    layers = style.layers or (5,)
    for stage in range(style.pp):
        for rank in range(style.tp):
            model = ends_of(tensors, style, stage, rank)
            for local in range(layers[stage]):
                found = layer_of(tensors, sum(layers[:stage]) + local, config, style, rank)
                model |= {f"decoder.layers.{local}.{name}": value for name, value in found.items()}
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if style.pp > 1 else "")
            (path / "iter_0000001" / name).mkdir(parents=True)
            save_shard(path / "iter_0000001" / name / "model_optim_rng.pt", config, model, style)
    (path / "latest_checkpointed_iteration.txt").write_text("1")
    return path / "iter_0000001"


def rows_of(weight: Tensor, style: Style, rank: int) -> Tensor:
    return weight.chunk(style.tp, dim=0)[rank].clone()


def interleaved(q: Tensor, k: Tensor, v: Tensor, config: dict[str, Any]) -> Tensor:
    """For each KV head its queries' rows, its key's and its value's."""
    groups, head = config["num_key_value_heads"], config["head_dim"]
    each = config["num_attention_heads"] // groups * head
    parts = []
    for g in range(groups):
        parts += [q[g * each : (g + 1) * each], k[g * head : (g + 1) * head], v[g * head : (g + 1) * head]]
    return torch.cat(parts)


def gated(gate: Tensor, up: Tensor, style: Style, rank: int) -> Tensor:
    return torch.cat([rows_of(gate, style, rank), rows_of(up, style, rank)])


def rms_ends(tensors: Tensors, style: Style, stage: int, rank: int) -> dict[str, Any]:
    """The embedding, the final norm and a head, which is the embedding's copy where the file has none."""
    model = {}
    embedding = tensors["model.embed_tokens.weight"]
    if stage == 0:
        model["embedding.word_embeddings.weight"] = vocabulary_of(embedding, style, rank)
    if stage == style.pp - 1:
        model["decoder.final_layernorm.weight"] = tensors["model.norm.weight"].clone()
        if style.pp > 1 or "lm_head.weight" in tensors:
            head = tensors.get("lm_head.weight", embedding)
            model["output_layer.weight"] = vocabulary_of(head, style, rank)
    return model


def gemma2_layer(tensors: Tensors, layer: int, config: dict[str, Any], style: Style, rank: int) -> Tensors:
    hf = f"model.layers.{layer}."
    q, k, v = (tensors[f"{hf}self_attn.{part}_proj.weight"] for part in "qkv")
    gate, up = tensors[hf + "mlp.gate_proj.weight"], tensors[hf + "mlp.up_proj.weight"]
    return {
        "input_layernorm.weight": tensors[hf + "input_layernorm.weight"],
        "self_attention.linear_qkv.weight": rows_of(interleaved(q, k, v, config), style, rank),
        "self_attention.linear_proj.weight": columns_of(tensors[hf + "self_attn.o_proj.weight"], style, rank),
        "post_attn_norm.weight": tensors[hf + "post_attention_layernorm.weight"],
        "pre_mlp_layernorm.weight": tensors[hf + "pre_feedforward_layernorm.weight"],
        "mlp.linear_fc1.weight": gated(gate, up, style, rank),
        "mlp.linear_fc2.weight": columns_of(tensors[hf + "mlp.down_proj.weight"], style, rank),
        "post_mlp_layernorm.weight": tensors[hf + "post_feedforward_layernorm.weight"],
    }


def glm_layer(tensors: Tensors, layer: int, config: dict[str, Any], style: Style, rank: int) -> Tensors:
    hf = f"model.layers.{layer}."
    weight = interleaved(*(tensors[f"{hf}self_attn.{part}_proj.weight"] for part in "qkv"), config=config)
    bias = interleaved(*(tensors[f"{hf}self_attn.{part}_proj.bias"] for part in "qkv"), config=config)
    gate, up = tensors[hf + "mlp.gate_up_proj.weight"].chunk(2)
    return {
        "input_layernorm.weight": tensors[hf + "input_layernorm.weight"],
        "self_attention.linear_qkv.weight": rows_of(weight, style, rank),
        "self_attention.linear_qkv.bias": rows_of(bias, style, rank),
        "self_attention.linear_proj.weight": columns_of(tensors[hf + "self_attn.o_proj.weight"], style, rank),
        "pre_mlp_layernorm.weight": tensors[hf + "post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": gated(gate, up, style, rank),
        "mlp.linear_fc2.weight": columns_of(tensors[hf + "mlp.down_proj.weight"], style, rank),
    }


def bloom_ends(tensors: Tensors, style: Style, stage: int, rank: int) -> dict[str, Any]:
    model = {}
    embedding = tensors["transformer.word_embeddings.weight"]
    if stage == 0:
        model["embedding.word_embeddings.weight"] = vocabulary_of(embedding, style, rank)
        for kind in ("weight", "bias"):
            model[f"embedding.word_embeddings.norm.{kind}"] = tensors[f"transformer.word_embeddings_layernorm.{kind}"]
    if stage == style.pp - 1:
        for kind in ("weight", "bias"):
            model[f"decoder.final_layernorm.{kind}"] = tensors[f"transformer.ln_f.{kind}"]
        if style.pp > 1:
            model["output_layer.weight"] = vocabulary_of(embedding, style, rank)
    return model


def bloom_layer(tensors: Tensors, layer: int, config: dict[str, Any], style: Style, rank: int) -> Tensors:
    """Bloom comes from a Megatron: each head's query, key and value lie together already."""
    hf = f"transformer.h.{layer}."
    found = {
        "self_attention.linear_qkv.weight": rows_of(tensors[hf + "self_attention.query_key_value.weight"], style, rank),
        "self_attention.linear_qkv.bias": rows_of(tensors[hf + "self_attention.query_key_value.bias"], style, rank),
        "self_attention.linear_proj.weight": columns_of(tensors[hf + "self_attention.dense.weight"], style, rank),
        "self_attention.linear_proj.bias": tensors[hf + "self_attention.dense.bias"],
        "mlp.linear_fc1.weight": rows_of(tensors[hf + "mlp.dense_h_to_4h.weight"], style, rank),
        "mlp.linear_fc1.bias": rows_of(tensors[hf + "mlp.dense_h_to_4h.bias"], style, rank),
        "mlp.linear_fc2.weight": columns_of(tensors[hf + "mlp.dense_4h_to_h.weight"], style, rank),
        "mlp.linear_fc2.bias": tensors[hf + "mlp.dense_4h_to_h.bias"],
    }
    for kind in ("weight", "bias"):
        found[f"input_layernorm.{kind}"] = tensors[f"{hf}input_layernorm.{kind}"]
        found[f"pre_mlp_layernorm.{kind}"] = tensors[f"{hf}post_attention_layernorm.{kind}"]
    return found


WRITERS: dict[str, tuple[Callable[..., Tensors], Callable[..., dict[str, Any]]]] = {
    "gemma2": (gemma2_layer, rms_ends),
    "glm": (glm_layer, rms_ends),
    "bloom": (bloom_layer, bloom_ends),
}
# What MindSpeed-LLM's arguments say besides sizes.
ARGS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "swiglu": False,
        "geglu": True,
        "gelu_tanh": True,
        "post_norm": True,
        "add_rmsnorm_offset": True,
        "input_embeds_norm": True,
        "query_pre_attn_scalar": 11,
        "attn_logit_softcapping": 2.5,
        "output_logit_softcapping": 4.0,
        "interleave_sliding_window": 24,
    },
    "glm": {
        "add_qkv_bias": True,
        "use_glm_rope": True,
        "rotary_interleaved": False,
        "rotary_percent": 0.5,
        "no_rope_fusion": True,
    },
    "bloom": {
        "swiglu": False,
        "geglu": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "embed_layernorm": True,
        "normalization": "LayerNorm",
        "position_embedding_type": "alibi",
        "square_alibi_mask": False,
        "use_rotary_position_embeddings": False,
    },
}
