"""Megatron directories of models with experts, however these are divided and named: read or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mindgen.weights.megatron import open_megatron
from mindgen.weights.open import open_source
from tests.weights.expert_folders import FAMILIES, assert_same, write_both
from tests.weights.foreign import Style
from tests.weights.foreign_experts import GROUPED, SEQUENTIAL, TRANSFORMER_ENGINE, ExpertStyle

DIVISIONS = {
    "tp 1": ExpertStyle(Style()),
    "tp 2": ExpertStyle(Style(tp=2)),
    "tp 4": ExpertStyle(Style(tp=4)),
    "pp 2": ExpertStyle(Style(pp=2)),
    "ep 2": ExpertStyle(Style(), ep=2),
    "ep 4 x tp 2": ExpertStyle(Style(tp=2), ep=4),
    "tp 2 x pp 2 x ep 2": ExpertStyle(Style(tp=2, pp=2), ep=2),
    "whole, tp 4, ep 2": ExpertStyle(Style(tp=4), ep=2, division="whole"),
    "whole, tp 2, ep 4": ExpertStyle(Style(tp=2), ep=4, division="whole"),
    "whole, tp 2, pp 2, ep 2": ExpertStyle(Style(tp=2, pp=2), ep=2, division="whole"),
    "extended, tp 2": ExpertStyle(Style(tp=2), division="extended"),
    "extended, tp 2, ep 2": ExpertStyle(Style(tp=2), ep=2, division="extended"),
    "neighbours, tp 4, ep 2": ExpertStyle(Style(tp=4), ep=2, division="neighbours"),
}


@pytest.mark.parametrize("names", [SEQUENTIAL, GROUPED, TRANSFORMER_ENGINE])
@pytest.mark.parametrize("division", DIVISIONS)
def test_experts_are_found_however_they_are_divided_and_named(tmp_path: Path, division: str, names: str) -> None:
    how = DIVISIONS[division]
    style = replace(how.style, transformer_engine=names == TRANSFORMER_ENGINE)
    megatron, folder = write_both(tmp_path, "qwen2_moe", replace(how, style=style, names=names))
    assert_same(open_source(megatron), open_source(folder))


@pytest.mark.parametrize("names", [SEQUENTIAL, GROUPED])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str, names: str) -> None:
    how = ExpertStyle(Style(tp=2, pp=2), ep=2, names=names, gate="mlp.shared_expert_gate.weight")
    megatron, folder = write_both(tmp_path, family, how)
    assert_same(open_source(megatron), open_source(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_args_and_weights_state_what_the_model_is(tmp_path: Path, family: str) -> None:
    args = {"n_shared_experts": None, "moe_shared_expert_intermediate_size": 16 if family == "qwen2_moe" else None}
    megatron, folder = write_both(tmp_path, family, ExpertStyle(Style(tp=2, args=args), ep=2), with_config=False)
    spec = open_source(megatron, {"--vocab-size": 61, "--rope-scaling-type": None}).spec
    assert spec == open_source(folder).spec


def test_mindspeed_states_experts_in_other_words(tmp_path: Path) -> None:
    args = {
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "softmax_topk",
        "moe_ffn_hidden_size": None,
        "moe_intermediate_size": 12,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
        "shared_expert_gate": True,
    }
    how = ExpertStyle(Style(args=args))
    megatron, _ = write_both(tmp_path, "qwen2_moe", how, with_config=False)
    with pytest.raises(ValueError, match="mlp.shared_experts"):
        open_source(megatron, {"--vocab-size": 61, "--rope-scaling-type": None}).check()  # two of 12 are not 16
    flags = {"--vocab-size": 61, "--rope-scaling-type": None, "--moe-shared-expert-intermediate-size": 24}
    spec = open_megatron(megatron, flags).spec
    assert (spec.shared_ffn_size, spec.renormalise_experts, spec.expert_layers) == (24, False, (1, 2, 3))


def test_whether_weights_sum_to_one_is_never_guessed(tmp_path: Path) -> None:
    how = ExpertStyle(Style(args={"moe_router_pre_softmax": None}))
    megatron, _ = write_both(tmp_path, "qwen3_moe", how, with_config=False)
    flags = {"--vocab-size": 61, "--rope-scaling-type": None}
    with pytest.raises(ValueError, match="--norm-topk-prob"):
        open_source(megatron, flags)
    assert open_source(megatron, flags | {"--norm-topk-prob": True}).spec.renormalise_experts


def test_flags_that_contradict_the_weights_are_named(tmp_path: Path) -> None:
    megatron, _ = write_both(tmp_path, "qwen2_moe", ExpertStyle())
    flags = {"--num-layers": 4, "--first-k-dense-replace": 2}
    with pytest.raises(ValueError, match=r"expert_layers: --moe-layer-freq says \(2, 3\), but it is \(1, 2, 3\)"):
        open_source(megatron, flags)


def test_what_shapes_leave_open_is_said_by_args_or_flag(tmp_path: Path) -> None:
    how = ExpertStyle(Style(tp=2, args=None), ep=2, division="extended", names=GROUPED)
    megatron, folder = write_both(tmp_path, "qwen3_moe", how)
    assert_same(open_source(megatron, {"--moe-tp-extend-ep": True}), open_source(folder))


@pytest.mark.parametrize(
    ("how", "args", "word"),
    [
        (ExpertStyle(Style(tp=2), ep=2), {"expert_tensor_parallel_size": 1}, "its args say 1"),
        (ExpertStyle(), {"num_experts": 4}, "num_experts: 4 in args"),
        (ExpertStyle(), {"moe_router_topk": 3}, "experts_per_token: 3 in args"),
        (ExpertStyle(), {"moe_router_pre_softmax": False}, "renormalise_experts: True in args"),
        (ExpertStyle(), {"moe_router_score_function": "sigmoid"}, "moe_router_score_function"),
        (ExpertStyle(), {"moe_router_load_balancing_type": "sparsemixer_topk"}, "sparsemixer_topk"),
        (ExpertStyle(), {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias"),
        (ExpertStyle(), {"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor"),
        (ExpertStyle(ep=2), {"expert_model_parallel_size": 4}, "expert parallel size 4"),
    ],
)
def test_args_that_say_otherwise_are_refused_by_name(
    tmp_path: Path, how: ExpertStyle, args: dict[str, Any], word: str
) -> None:
    megatron, _ = write_both(tmp_path, "qwen2_moe", replace(how, style=replace(how.style, args=args)))
    with pytest.raises(ValueError, match=word):
        open_source(megatron)


@pytest.mark.parametrize(
    ("how", "lost", "word"),
    [
        (ExpertStyle(Style(tp=2), ep=2), "mp_rank_01_000", "mp_rank_01_000"),
        (ExpertStyle(Style(tp=2, pp=2), ep=2), "mp_rank_01_001_001", "mp_rank_01_001_001"),
        (ExpertStyle(Style(tp=4), ep=2, division="neighbours"), "mp_rank_01_000", "mp_rank_01_000"),
    ],
)
def test_a_shard_that_is_missing_is_named(tmp_path: Path, how: ExpertStyle, lost: str, word: str) -> None:
    megatron, _ = write_both(tmp_path, "qwen3_moe", how)
    (megatron / "iter_0000001" / lost).rename(tmp_path / lost)
    with pytest.raises(ValueError, match=word):
        open_source(megatron).check()


def test_two_shards_whose_names_would_fit_another_division_are_missed(tmp_path: Path) -> None:
    megatron, _ = write_both(tmp_path, "qwen3_moe", ExpertStyle(Style(tp=2), ep=2))
    for lost in ("mp_rank_01_000", "mp_rank_00_001"):
        (megatron / "iter_0000001" / lost).rename(tmp_path / lost)
    with pytest.raises(ValueError, match="part 2 of 2 of the experts 0 to 3"):
        open_source(megatron)


def spoil(file: Path, change: str) -> None:
    shard = torch.load(file, weights_only=True)
    model, prefix = shard["model"], "decoder.layers.1.mlp."
    second = prefix + "experts.local_experts.0.linear_fc2.weight"
    if change == "flat router":
        model[prefix + "router.weight"] = torch.zeros(8)
    elif change == "flat expert":
        model[second] = torch.zeros(7)
    elif change == "no second matrices":
        shard["model"] = {name: value for name, value in model.items() if "linear_fc2" not in name}
    elif change == "one expert less":
        shard["model"] = {name: value for name, value in model.items() if "local_experts.3." not in name}
    elif change == "one matrix less":
        del model[second]
    elif change == "one expert more":
        model[prefix + "experts.local_experts.4.linear_fc1.weight"] = torch.zeros(12, 32)
    elif change == "grouped and odd":
        model[prefix + "experts.weight2"] = torch.zeros(7, 32)
    elif change == "only half grouped":
        model[prefix + "experts.weight1"] = torch.zeros(32, 96)
    torch.save(shard, file)


@pytest.mark.parametrize(
    "change",
    [
        "flat router",
        "flat expert",
        "no second matrices",
        "one expert less",
        "one matrix less",
        "one expert more",
        "grouped and odd",
        "only half grouped",
    ],
)
def test_damaged_experts_are_refused(tmp_path: Path, change: str) -> None:
    megatron, _ = write_both(tmp_path, "qwen3_moe", ExpertStyle(Style(tp=2, args=None), ep=2))
    for number, file in enumerate(sorted((megatron / "iter_0000001").glob("*/*.pt"))):
        if number == 0 or change in ("one expert less", "grouped and odd"):
            spoil(file, change)
    with pytest.raises(ValueError, match=r"mp_rank_00|iter_0000001"):
        open_source(megatron).check()


def test_a_shard_of_a_rank_that_cannot_be_is_refused(tmp_path: Path) -> None:
    megatron, _ = write_both(tmp_path, "qwen3_moe", ExpertStyle(Style(tp=2), ep=2))
    folder = megatron / "iter_0000001"
    (folder / "mp_rank_00_000").rename(folder / "mp_rank_999999999_000")
    with pytest.raises(ValueError, match="1000000000 x 1 x"):
        open_source(megatron)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 4},
        {"num_experts": 16},
        {"moe_intermediate_size": 24},
        {"shared_expert_intermediate_size": 8},
        {"mlp_only_layers": []},
        {"mlp_only_layers": [0, 1]},
        {"decoder_sparse_step": 2},
        {"intermediate_size": 96},
    ],
    ids=str,
)
def test_a_config_of_other_experts_does_not_load(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, folder = write_both(tmp_path, "qwen2_moe", ExpertStyle())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=r"wrong shape|missing|left over"):
        open_source(folder).check()
