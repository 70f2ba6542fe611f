"""Conversions of models with experts: there and back, and as others write them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindgen.weights.convert import convert
from mindgen.weights.open import open_source
from mindgen.weights.shards import open_shard
from tests.weights.expert_folders import FAMILIES, assert_same, config_for, write_both
from tests.weights.foreign import Style
from tests.weights.foreign_experts import GROUPED, ExpertStyle

LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 1, 2), (4, 1, 4)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact(tmp_path: Path, family: str, layout: tuple[int, int, int]) -> None:
    _, folder = write_both(tmp_path, family, ExpertStyle())
    convert(config_for(folder, tmp_path / "there", *layout))
    source = open_source(tmp_path / "there")
    assert_same(source, open_source(folder))
    source.close()
    for number, (tp, pp, ep) in enumerate([(2, 1, 2), (1, 2, 1)]):
        path = tmp_path / ("there" if number == 0 else "again0")
        convert(config_for(path, tmp_path / f"again{number}", tp, pp, ep, "mg mg", save_format="safetensors"))
    back = convert(config_for(tmp_path / "again1", tmp_path / "back", 1, 1, 1, "mg hf"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("layout", [(1, 1, 1), (4, 2, 2), (4, 1, 4)], ids=str)
def test_grouped_experts_are_written_as_others_write_them(tmp_path: Path, layout: tuple[int, int, int]) -> None:
    tp, pp, ep = layout
    how = ExpertStyle(Style(tp=tp, pp=pp, padded_vocab=64), ep=ep, division="neighbours", names=GROUPED)
    theirs, folder = write_both(tmp_path, "qwen2_moe", how)
    convert(
        config_for(folder, tmp_path / "ours", *layout, moe_grouped_gemm=True, make_vocab_size_divisible_by=64 // tp)
    )
    assert_same(open_source(tmp_path / "ours"), open_source(folder))
    for file in sorted((theirs / "iter_0000001").glob("mp_rank_*/*.pt")):
        expected, found = (open_shard(path) for path in (file, tmp_path / "ours" / file.relative_to(theirs)))
        assert found.names.keys() == expected.names.keys()
        assert found.args["moe_grouped_gemm"]
        for name in expected.names:
            size = expected.describe(name)[0][0]
            assert torch.equal(found.slice(name, 0, 0, size), expected.slice(name, 0, 0, size)), name


def test_a_shard_of_ours_says_how_experts_are_divided(tmp_path: Path) -> None:
    _, folder = write_both(tmp_path, "mixtral", ExpertStyle())
    convert(config_for(folder, tmp_path / "ours", 4, 2, 2))
    names = sorted(path.name for path in (tmp_path / "ours" / "iter_0000001").glob("mp_rank_*"))
    assert names == [f"mp_rank_{rank:02d}_{stage:03d}_{rank // 2:03d}" for rank in range(4) for stage in range(2)]
    with torch.serialization.safe_globals([Namespace]):
        file = tmp_path / "ours" / "iter_0000001" / "mp_rank_03_001_001" / "model_optim_rng.pt"
        shard = torch.load(file, weights_only=True)
    args = shard["args"]
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size, args.num_experts) == (2, 2, 8)
    assert (args.moe_router_topk, args.moe_ffn_hidden_size, args.moe_layer_freq) == (2, 48, 1)
    assert (args.moe_router_pre_softmax, args.norm_topk_prob, args.moe_grouped_gemm) == (False, True, False)
    name = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    theirs = load_file(folder / "model.safetensors")
    prefix = "model.layers.3.block_sparse_moe.experts.7."  # the last layer, the last expert, its second half
    expected = torch.cat([theirs[f"{prefix}{word}.weight"][24:] for word in ("w1", "w3")])
    assert torch.equal(shard["model"][name], expected)


def test_a_config_of_ours_describes_a_model_of_which_only_megatron_words_were_known(tmp_path: Path) -> None:
    how = ExpertStyle(Style(args={"moe_shared_expert_intermediate_size": 16}))
    megatron, folder = write_both(tmp_path, "qwen2_moe", how, with_config=False)
    flags = {"--vocab-size": 61, "--rope-scaling-type": None}
    back = convert(config_for(megatron, tmp_path / "back", 1, 1, 1, "mg hf"), flags)
    assert open_source(back).spec == open_source(folder).spec


def test_existing_converters_write_the_names_of_families_otherwise(tmp_path: Path) -> None:
    _, folder = write_both(tmp_path, "qwen2_moe", ExpertStyle())
    convert(config_for(folder, tmp_path / "ours", 1, 1, 1, model_type_hf="qwen2-moe"))
    with pytest.raises(ValueError, match="mixtral, but .* holds a qwen2_moe model"):
        convert(config_for(folder, tmp_path / "others", 1, 1, 1, model_type_hf="mixtral"))


def test_a_way_of_dividing_that_is_not_written_is_refused(tmp_path: Path) -> None:
    _, folder = write_both(tmp_path, "qwen3_moe", ExpertStyle())
    with pytest.raises(ValueError, match="--moe-tp-extend-ep"):
        convert(config_for(folder, tmp_path / "ours", 2, 1, 1), {"--moe-tp-extend-ep": True})
    with pytest.raises(ValueError, match="4 tensor ranks are not divisible by 8"):
        convert(config_for(folder, tmp_path / "ours", 4, 1, 8))
