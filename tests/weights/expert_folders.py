"""Tiny models with experts: Hugging Face folders, the same weights as a foreign Megatron directory, and conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mindgen.weights.convert import ConvertConfig
from mindgen.weights.families import rows_of
from mindgen.weights.rows import axis_sizes, whole_rows
from mindgen.weights.source import Source
from tests.weights.folders import config_of, shapes
from tests.weights.foreign_experts import ExpertStyle, write_experts

EXPERTS = {
    "rope_scaling": None,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {"rope_scaling": None, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2", EXPERTS | {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3", EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 2, "tie_word_embeddings": False}),
}


def config_with_experts(family: str) -> dict[str, Any]:
    base, changes = FAMILIES[family]
    return config_of(base, **changes, model_type=family, num_hidden_layers=4)


def has_experts(config: dict[str, Any], layer: int) -> bool:
    every = config.get("decoder_sparse_step", 1)
    return (layer + 1) % every == 0 and layer not in config.get("mlp_only_layers", ())


def random_experts(family: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by Hugging Face's names."""
    sizes: dict[str, tuple[int, ...]] = dict(shapes(config | {"model_type": FAMILIES[family][0]}))
    hidden = config["hidden_size"]
    for layer in filter(lambda layer: has_experts(config, layer), range(config["num_hidden_layers"])):
        mlp = f"model.layers.{layer}.mlp."
        for part in ("gate", "up", "down"):
            del sizes[f"{mlp}{part}_proj.weight"]
        block = mlp if family != "mixtral" else mlp.replace("mlp", "block_sparse_moe")
        words = ("gate_proj", "up_proj", "down_proj") if family != "mixtral" else ("w1", "w3", "w2")
        count = config.get("num_experts") or config["num_local_experts"]
        ffn = config.get("moe_intermediate_size") or config["intermediate_size"]
        sizes[block + "gate.weight"] = (count, hidden)
        for expert in range(count):
            for word, shape in zip(words, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True):
                sizes[f"{block}experts.{expert}.{word}.weight"] = shape
        if "shared_expert_intermediate_size" in config:
            ffn = config["shared_expert_intermediate_size"]
            for word, shape in zip(words, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True):
                sizes[f"{block}shared_expert.{word}.weight"] = shape
            sizes[block + "shared_expert_gate.weight"] = (1, hidden)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in sizes.items()}


def write_both(path: Path, family: str, how: ExpertStyle, with_config: bool = True) -> tuple[Path, Path]:
    """The same weights as a Megatron directory of a foreign writer and as a Hugging Face folder."""
    config = config_with_experts(family)
    tensors = random_experts(family, config)
    folder = write_experts(path / "mg", config, tensors, how)
    (path / "hf").mkdir()
    save_file(tensors, path / "hf" / "model.safetensors")
    for target in [path / "hf"] + [folder] * with_config:
        (target / "config.json").write_text(json.dumps(config))
    return path / "mg", path / "hf"


def assert_same(source: Source, reference: Source) -> None:
    assert source.spec == reference.spec
    source.check()
    sizes = axis_sizes(source.spec)
    for row, layer in whole_rows(rows_of(source.spec.family), source.spec):
        size = sizes[row.split] if row.split else 1
        expected = reference.read(row, layer, 0, size)
        assert torch.equal(source.read(row, layer, 0, size), expected), (row.hf, layer)
        if row.split and size > 2:
            part = source.read(row, layer, 1, size - 1)
            assert torch.equal(part, expected.narrow(row.names.index(row.split), 1, size - 2))


def config_for(load: Path, save: Path, tp: int, pp: int, ep: int, kinds: str = "hf mg", **more: Any) -> ConvertConfig:
    load_kind, save_kind = kinds.split()
    return ConvertConfig(
        load_model_type=load_kind,
        save_model_type=save_kind,
        load_dir=str(load),
        save_dir=str(save),
        target_tensor_parallel_size=tp,
        target_pipeline_parallel_size=pp,
        target_expert_parallel_size=ep,
        **more,
    )
