"""Megatron directories as Megatron and MindSpeed-LLM write them, built with plain loops and none of mindgen's code."""

from __future__ import annotations

import argparse
import enum
import io
import signal
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Style:
    """How a checkpoint is written.

    padded_vocab: rows of the embedding over all ranks. layers: how many each stage has. protocol: of the pickle.
    transformer_engine: its names, with `_extra_state`. args: changes to the pickled arguments; None for no `args`.
    """

    tp: int = 1
    pp: int = 1
    layers: tuple[int, ...] | None = None
    padded_vocab: int = 64
    protocol: int = 2
    transformer_engine: bool = False
    tracker: str = "1"
    args: dict[str, Any] | None = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)


def write_megatron(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], style: Style) -> Path:
    """Writes a checkpoint directory; returns the folder of its iteration."""
    layers = style.layers or (config["num_hidden_layers"] // style.pp,) * style.pp
    folder = path / ("release" if style.tracker == "release" else f"iter_{int(style.tracker):07d}")
    for stage in range(style.pp):
        for rank in range(style.tp):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if style.pp > 1 else "")
            (folder / name).mkdir(parents=True)
            model = shard_of(config, tensors, style, sum(layers[:stage]), layers[stage], stage, rank)
            save_shard(folder / name / "model_optim_rng.pt", config, model, style)
    (path / "latest_checkpointed_iteration.txt").write_text(style.tracker)
    return folder


def shard_of(
    config: dict[str, Any], tensors: dict[str, Tensor], style: Style, first: int, count: int, stage: int, rank: int
) -> dict[str, Any]:
    """What one file holds of a dense model, or of one with experts without those."""
    model: dict[str, Any] = {}
    tied = config.get("tie_word_embeddings")
    if stage == 0:
        model["embedding.word_embeddings.weight"] = vocabulary_of(tensors["model.embed_tokens.weight"], style, rank)
    for local in range(count):
        model |= _layer(config, tensors, style, first + local, local, rank)
    if stage == style.pp - 1:
        model["decoder.final_layernorm.weight"] = tensors["model.norm.weight"].clone()
        if not tied:
            model["output_layer.weight"] = vocabulary_of(tensors["lm_head.weight"], style, rank)
        elif style.pp > 1:
            model["output_layer.weight"] = vocabulary_of(tensors["model.embed_tokens.weight"], style, rank)
    return model


def vocabulary_of(weight: Tensor, style: Style, rank: int) -> Tensor:
    missing = style.padded_vocab - weight.shape[0]
    padded = torch.cat([weight, weight[-1:].repeat(missing, 1)])
    return padded.chunk(style.tp, dim=0)[rank].clone()


def _layer(
    config: dict[str, Any], tensors: dict[str, Tensor], style: Style, layer: int, local: int, rank: int
) -> dict[str, Any]:
    theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{local}."
    groups, head = config["num_key_value_heads"], config["head_dim"]
    each = config["num_attention_heads"] // groups * head

    def interleaved(kind: str) -> Tensor:
        q, k, v = (tensors[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv")
        parts = []
        for g in range(groups):
            parts += [q[g * each : (g + 1) * each], k[g * head : (g + 1) * head], v[g * head : (g + 1) * head]]
        return torch.cat(parts).chunk(style.tp, dim=0)[rank].clone()

    te, is_dense = style.transformer_engine, theirs + "mlp.gate_proj.weight" in tensors
    norm = "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight"
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if te and is_dense else "pre_mlp_layernorm.weight"
    found = {
        norm: tensors[theirs + "input_layernorm.weight"].clone(),
        "self_attention.linear_qkv.weight": interleaved("weight"),
        "self_attention.linear_proj.weight": columns_of(tensors[theirs + "self_attn.o_proj.weight"], style, rank),
        mlp_norm: tensors[theirs + "post_attention_layernorm.weight"].clone(),
    }
    if is_dense:
        gate, up = (tensors[f"{theirs}mlp.{part}_proj.weight"].chunk(style.tp, dim=0)[rank] for part in ("gate", "up"))
        found["mlp.linear_fc1.weight"] = torch.cat([gate, up])
        found["mlp.linear_fc2.weight"] = columns_of(tensors[theirs + "mlp.down_proj.weight"], style, rank)
    if theirs + "self_attn.q_proj.bias" in tensors:
        found["self_attention.linear_qkv.bias"] = interleaved("bias")
    if theirs + "self_attn.q_norm.weight" in tensors:
        found["self_attention.q_layernorm.weight"] = tensors[theirs + "self_attn.q_norm.weight"].clone()
        found["self_attention.k_layernorm.weight"] = tensors[theirs + "self_attn.k_norm.weight"].clone()
    if te:
        found["self_attention.linear_qkv._extra_state"] = torch.zeros(7, dtype=torch.uint8)
        found["mlp.linear_fc1._extra_state"] = None
        found["self_attention.core_attention._extra_state"] = io.BytesIO(b"scales")
    return {ours + name: value for name, value in found.items()}


def columns_of(weight: Tensor, style: Style, rank: int) -> Tensor:
    return weight.chunk(style.tp, dim=1)[rank].clone()


def megatron_args(config: dict[str, Any], style: Style) -> dict[str, Any]:
    """What Megatron's arguments say of a model, as far as they do: no rope scaling, and a norm's epsilon."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "max_position_embeddings": config["max_position_embeddings"],
        "norm_epsilon": config["rms_norm_eps"],
        "rotary_base": int(config["rope_theta"]),
        "rotary_percent": 1.0,
        "position_embedding_type": "rope",
        "swiglu": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "padded_vocab_size": style.padded_vocab,
        "tensor_model_parallel_size": style.tp,
        "pipeline_model_parallel_size": style.pp,
        "expert_model_parallel_size": 1,
        "rope_scaling_type": None,
        "rope_scaling_factor": 8.0,
        "use_rope_scaling": False,
        "num_experts": None,
    } | (style.args or {})


def save_shard(path: Path, config: dict[str, Any], model: dict[str, Any], style: Style) -> None:
    with _fake_megatron() as model_type:
        shard: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 1, "model": model}
        if style.args is not None:
            args = megatron_args(config, style)
            args |= {"model_type": model_type.encoder_or_decoder, "params_dtype": torch.bfloat16, "save": Path("/x")}
            args |= {"exit_signal": signal.SIGTERM, "nodes": {1: "a"}}
            shard["args"] = argparse.Namespace(**args)
            shard["rng_state"] = [{"np_rng_state": ("MT19937", __import__("numpy").arange(3), 1, 0, 0.0)}]
        torch.save(shard | style.top, path, pickle_protocol=style.protocol)


@contextmanager
def _fake_megatron() -> Any:
    """`megatron.core.enums`, while something is pickled: no such package is there when the file is read."""

    class ModelType(enum.Enum):
        encoder_or_decoder = 1

    module = types.ModuleType("megatron.core.enums")
    ModelType.__module__, ModelType.__qualname__ = module.__name__, "ModelType"
    module.ModelType = ModelType  # type: ignore[attr-defined]
    names = ("megatron", "megatron.core", "megatron.core.enums")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: types.ModuleType(name) for name in names[:2]} | {names[2]: module})
    try:
        yield ModelType
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
