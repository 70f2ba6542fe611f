"""Megatron directories of models with experts as Megatron and MindSpeed-LLM write them, in plain loops.

None of mindgen's code; attention and vocabulary are those of foreign.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.weights.foreign import Style, save_shard, shard_of

SEQUENTIAL, GROUPED, TRANSFORMER_ENGINE = "sequential", "grouped", "transformer engine"


@dataclass(frozen=True)
class ExpertStyle:
    """How experts are divided and named.

    division: `tp` (every tensor rank has a part of each expert of its expert rank), `whole` (expert tensor parallel
    size 1), `extended` (--moe-tp-extend-ep) or `neighbours` (tp / ep tensor ranks share an expert).
    """

    style: Style = field(default_factory=Style)
    ep: int = 1
    division: str = "tp"
    names: str = SEQUENTIAL
    gate: str = "mlp.shared_experts.gate_weight"


def write_experts(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], how: ExpertStyle) -> Path:
    """Writes a checkpoint directory; returns the folder of its iteration."""
    style, folder = how.style, path / "iter_0000001"
    layers = style.layers or (config["num_hidden_layers"] // style.pp,) * style.pp
    for stage in range(style.pp):
        for tp, ep in pairs(how):
            name = f"mp_rank_{tp:02d}"
            name += f"_{stage:03d}" if style.pp > 1 else ""
            name += f"_{ep:03d}" if how.ep > 1 else ""
            (folder / name).mkdir(parents=True)
            first = sum(layers[:stage])
            model = shard_of(config, tensors, style, first, layers[stage], stage, tp)
            for local in range(layers[stage]):
                found = experts_in_place_of_mlp(config, tensors, how, first + local, tp, ep)
                model |= {f"decoder.layers.{local}.{name}": value for name, value in found.items()}
            save_shard(folder / name / "model_optim_rng.pt", config, model, _with_args(config, how))
    (path / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


def pairs(how: ExpertStyle) -> list[tuple[int, int]]:
    """The tensor and expert ranks that have a file."""
    tp, ep = how.style.tp, how.ep
    if how.division == "neighbours":
        return [(rank, rank // (tp // ep)) for rank in range(tp)]
    if how.division == "whole" and tp % ep == 0:
        return [(rank, rank % ep) for rank in range(tp)]
    if how.division == "whole":
        return [(expert % tp, expert) for expert in range(ep)]
    return [(rank, expert) for expert in range(ep) for rank in range(tp)]


def _with_args(config: dict[str, Any], how: ExpertStyle) -> Style:
    if how.style.args is None:
        return how.style
    count = config.get("num_experts") or config["num_local_experts"]
    args = {
        "num_experts": count,
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config.get("moe_intermediate_size"),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", True),
        "expert_model_parallel_size": how.ep,
        "moe_tp_extend_ep": how.division == "extended",
        "moe_grouped_gemm": how.names != SEQUENTIAL,
    }
    return replace(how.style, args=args | how.style.args)


def experts_in_place_of_mlp(
    config: dict[str, Any], tensors: dict[str, Tensor], how: ExpertStyle, layer: int, tp: int, ep: int
) -> dict[str, Tensor]:
    """What one file has in place of an MLP, by the names of the layer; nothing for one that has an MLP."""
    theirs = f"model.layers.{layer}."
    if theirs + "mlp.gate_proj.weight" in tensors:
        return {}
    mixtral = config["model_type"] == "mixtral"
    block = theirs + ("block_sparse_moe." if mixtral else "mlp.")
    words = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {"mlp.router.weight": tensors[block + "gate.weight"].clone()}
    mine = []
    for expert in experts_of(config, how, tp, ep):
        parts = (tensors[f"{block}experts.{expert}.{word}.weight"] for word in words)
        mine.append(list(two("", *parts, *part_of(how, tp)).values()))
    found |= named(mine, how.names)
    if block + "shared_expert_gate.weight" in tensors:
        shared = (tensors[f"{block}shared_expert.{word}.weight"] for word in words)
        found |= two("mlp.shared_experts.linear_fc", *shared, tp, how.style.tp)
        found[how.gate] = tensors[block + "shared_expert_gate.weight"].clone()
    return found


def experts_of(config: dict[str, Any], how: ExpertStyle, tp: int, ep: int) -> range:
    """The global numbers of a file's experts."""
    count = config.get("num_experts") or config["num_local_experts"]
    if how.division == "extended":
        each, block = count // (how.ep * how.style.tp), ep * how.style.tp + tp
    else:
        each, block = count // how.ep, ep
    return range(block * each, block * each + each)


def part_of(how: ExpertStyle, tp: int) -> tuple[int, int]:
    """Which part of how many a file has of its experts."""
    if how.division == "tp":
        return tp, how.style.tp
    if how.division == "neighbours":
        return tp % (how.style.tp // how.ep), how.style.tp // how.ep
    return 0, 1


def two(prefix: str, gate: Tensor, up: Tensor, down: Tensor, part: int, parts: int) -> dict[str, Tensor]:
    """The two matrices of an MLP, of which a file has one part of several."""
    return {
        f"{prefix}1.weight": torch.cat([gate.chunk(parts, dim=0)[part], up.chunk(parts, dim=0)[part]]),
        f"{prefix}2.weight": down.chunk(parts, dim=1)[part].clone(),
    }


def named(experts: list[list[Tensor]], names: str) -> dict[str, Tensor]:
    """The experts of a file under the names of one of Megatron's kinds of layers."""
    if names == GROUPED:
        hidden = experts[0][0].shape[1]
        one, other = (torch.stack([expert[number].t() for expert in experts]) for number in (0, 1))
        return {"mlp.experts.weight1": one.view(hidden, -1), "mlp.experts.weight2": other.view(-1, hidden)}
    found = {}
    for number, (one, other) in enumerate(experts):
        if names == TRANSFORMER_ENGINE:
            found |= {f"mlp.experts.linear_fc1.weight{number}": one, f"mlp.experts.linear_fc2.weight{number}": other}
        else:
            prefix = f"mlp.experts.local_experts.{number}."
            found |= {prefix + "linear_fc1.weight": one, prefix + "linear_fc2.weight": other}
    return found
