"""The converter in every direction: nothing changes on the way, and everything belongs to what it writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mindgen.commands.convert import main
from mindgen.weights.open import open_source
from mindgen.weights.pickles import load_pickle
from mindgen.weights.write_huggingface import plan_huggingface
from tests.weights.folders import FAMILIES, config_of, random_tensors, read_folder, same, write_folder
from tests.weights.foreign import Style, write_megatron

ROOT = Path(__file__).parents[2]
ITERATION = "iter_0000001"


def convert(*flags: Any) -> int:
    return main([str(flag) for flag in flags])


def to_megatron(load: Path, save: Path, tp: int = 1, pp: int = 1, *flags: Any, kind: str = "hf") -> Path:
    code = convert(
        "--load-model-type", kind, "--save-model-type", "mg", "--load-dir", load, "--save-dir", save,
        "--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp, *flags,
    )  # fmt: skip
    assert code == 0
    return save


def to_huggingface(load: Path, save: Path, *flags: Any) -> Path:
    code = convert("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", load, "--save-dir", save, *flags)
    assert code == 0
    return save / "mg2hf"


def shards(path: Path) -> dict[str, Tensor]:
    """Every tensor of a Megatron directory by shard and name."""
    found = {}
    for file in sorted((path / ITERATION).glob("mp_rank_*/*")):
        model = load_pickle(file)["model"] if file.suffix == ".pt" else read_folder(file.parent)
        found |= {f"{file.parent.name}:{name}": tensor for name, tensor in model.items()}
    return found


LAYOUTS = {
    "1x1": (1, 1, ()),
    "2x2": (2, 2, ()),
    "4x1, above 2 groups": (4, 1, ("--save-format", "safetensors")),
    "2x3, uneven": (2, 3, ("--num-layer-list", "1,3,1", "--save-format", "safetensors")),
    "8x5, padded": (8, 5, ("--make-vocab-size-divisible-by", 16)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_nothing_changes(tmp_path: Path, family: str, layout: Any) -> None:
    tp, pp, flags = layout
    origin = write_folder(tmp_path / "origin", config_of(family))
    megatron = to_megatron(origin, tmp_path / "mg", tp, pp, *flags)
    back = to_huggingface(megatron, tmp_path / "back")
    assert same(read_folder(back), read_folder(origin))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (megatron / ITERATION / name).read_bytes() == (origin / name).read_bytes() == (back / name).read_bytes()
    assert [path.parent for path in tmp_path.rglob("*.py")] == [origin], "code is not copied"
    assert open_source(back).spec == open_source(megatron).spec == open_source(origin).spec


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2"])
@pytest.mark.parametrize("save_format", ["torch", "safetensors"])
def test_shards_of_shards_are_those_of_the_origin(tmp_path: Path, family: str, save_format: str) -> None:
    origin = write_folder(tmp_path / "origin", config_of(family))
    flags = ("--save-format", save_format)
    direct = to_megatron(origin, tmp_path / "direct", 2, 2, *flags)
    for tp, pp in ((4, 1), (1, 1)):
        other = to_megatron(origin, tmp_path / f"of {tp}", tp, pp)
        again = to_megatron(other, tmp_path / f"from {tp}", 2, 2, *flags, kind="mg")
        assert same(shards(again), shards(direct))
        assert [path.stat().st_size for path in sorted(again.rglob("mp_rank_*/*"))] == [
            path.stat().st_size for path in sorted(direct.rglob("mp_rank_*/*"))
        ]


@pytest.mark.parametrize("style", [Style(tp=2, pp=2, layers=(3, 2), padded_vocab=64), Style(tp=4, padded_vocab=64)])
@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "qwen3"])
def test_shards_are_those_that_megatron_writes(tmp_path: Path, family: str, style: Style) -> None:
    config = config_of(family)
    origin = write_folder(tmp_path / "origin", config)
    write_megatron(tmp_path / "theirs", config, random_tensors(config), style)
    divisor = 64 // style.tp
    ours = to_megatron(origin, tmp_path / "ours", style.tp, style.pp, "--make-vocab-size-divisible-by", divisor)
    assert same(shards(ours), shards(tmp_path / "theirs"))


def test_a_shard_has_what_megatrons_loaders_look_at(tmp_path: Path) -> None:
    origin = write_folder(tmp_path / "origin", config_of("qwen2"))
    path = to_megatron(origin, tmp_path / "mg", 2, 2)
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "1"
    file = path / ITERATION / "mp_rank_01_001" / "model_optim_rng.pt"
    shard = torch.load(file, weights_only=False)
    assert set(shard) == {"args", "checkpoint_version", "iteration", "model"}
    assert (shard["checkpoint_version"], shard["iteration"]) == (3.0, 1)
    args = vars(shard["args"])
    expected = {
        "num_layers": 5, "hidden_size": 32, "num_attention_heads": 8, "add_position_embedding": True,
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_query_groups": 2, "kv_channels": 4,
        "group_query_attention": True, "ffn_hidden_size": 48, "norm_epsilon": 3e-5, "rotary_base": 5000, "swiglu": True,
        "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False, "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": True, "padded_vocab_size": 62, "vocab_size": 61, "num_layer_list": "3,2",
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert all(isinstance(value, int | float | str | list | None) for value in args.values())
    assert all(
        tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        for tensor in shard["model"].values()
    )


def test_what_the_args_say_is_enough_without_the_manifest(tmp_path: Path) -> None:
    origin = write_folder(tmp_path / "origin", config_of())
    path = to_megatron(origin, tmp_path / "mg", 2, 2)
    spec = open_source(path).spec
    for name in ("mindgen_manifest.json", "config.json"):
        (path / ITERATION / name).unlink()
    assert open_source(path).spec == spec


def test_padding_is_copies_of_the_last_row(tmp_path: Path) -> None:
    origin = write_folder(tmp_path / "origin", config_of())
    found = shards(to_megatron(origin, tmp_path / "mg", 2, 1, "--make-vocab-size-divisible-by", 32))
    last = read_folder(origin)["model.embed_tokens.weight"][60]
    assert torch.equal(found["mp_rank_01:embedding.word_embeddings.weight"][28:], last.expand(4, -1))


def test_a_head_that_is_said_to_be_tied_but_is_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untied = random_tensors(config_of())
    folder = write_megatron(tmp_path / "mg", config_of(), untied, Style(tp=2, pp=5, args=None))
    (folder / "config.json").write_text(json.dumps(config_of("tied")))
    usual = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", tmp_path / "mg")
    assert convert(*usual, "--save-dir", tmp_path / "hf") == 2
    assert "output_layer.weight is not a copy of embedding.word_embeddings.weight" in capsys.readouterr().err


def test_another_models_config_at_the_tokenizer_does_not_get_in(tmp_path: Path) -> None:
    origin = write_folder(tmp_path / "origin", config_of())
    other = write_folder(tmp_path / "other", config_of("qwen2"))
    (other / "tokenizer.json").write_text('{"version": "2.0"}')
    path = to_megatron(origin, tmp_path / "mg", 1, 1, "--tokenizer-name-or-path", other)
    assert (path / ITERATION / "config.json").read_bytes() == (origin / "config.json").read_bytes()
    assert (path / ITERATION / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_a_config_that_a_flag_overruled_is_written_anew(tmp_path: Path) -> None:
    config = config_of("qwen3")
    style = Style(args={"rotary_base": 777})
    folder = write_megatron(tmp_path / "mg", config, random_tensors(config), style)
    (folder / "config.json").write_text(json.dumps(config))
    back = to_huggingface(tmp_path / "mg", tmp_path / "back", "--rotary-base", "777")
    assert open_source(back).spec.rope_theta == 777


def test_without_any_config_one_is_made_from_what_args_and_flags_say(tmp_path: Path) -> None:
    config = config_of("qwen2")
    write_megatron(tmp_path / "mg", config, random_tensors(config), Style(tp=2))
    back = to_huggingface(tmp_path / "mg", tmp_path / "back", "--rope-scaling-type", "none", "--vocab-size", "61")
    origin = write_folder(tmp_path / "origin", config)
    assert open_source(back).spec == open_source(origin).spec
    assert same(read_folder(back), read_folder(origin))


class TestDtypes:
    def test_each_tensor_keeps_its_own(self, tmp_path: Path) -> None:
        config = config_of()
        tensors = random_tensors(config)
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].float()
        origin = write_folder(tmp_path / "origin", config, tensors)
        for save_format in ("torch", "safetensors"):
            path = to_megatron(origin, tmp_path / save_format, 2, 1, "--save-format", save_format)
            assert same(read_folder(to_huggingface(path, tmp_path / f"back {save_format}")), tensors)

    @pytest.mark.parametrize(("word", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
    def test_params_dtype_converts_all(self, tmp_path: Path, word: str, dtype: torch.dtype) -> None:
        origin = write_folder(tmp_path / "origin", config_of())
        path = to_megatron(origin, tmp_path / "mg", 2, 2, "--params-dtype", word)
        back = to_huggingface(path, tmp_path / "back")
        assert same(read_folder(back), {name: value.to(dtype) for name, value in read_folder(origin).items()})
        stated = json.loads((back / "config.json").read_text())
        assert stated == json.loads((origin / "config.json").read_text()) | {"torch_dtype": str(dtype)[6:]}
        assert open_source(path).spec.dtype == str(dtype)[6:]

    def test_a_value_that_fp16_cannot_hold_is_an_error_that_names_the_tensor(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tensors = random_tensors(config_of())
        tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = 1e5
        origin = write_folder(tmp_path / "origin", config_of(), tensors)
        code = convert(
            "--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", origin, "--save-dir", tmp_path / "mg",
            "--params-dtype", "fp16",
        )  # fmt: skip
        assert code == 2 and not (tmp_path / "mg").exists()
        assert "decoder.layers.2.mlp.linear_fc2.weight has values beyond 65504" in capsys.readouterr().err


def test_a_hugging_face_folder_of_several_files_has_an_index(tmp_path: Path) -> None:
    origin = write_folder(tmp_path / "origin", config_of("qwen2"))
    source = open_source(to_megatron(origin, tmp_path / "mg", 2))
    (tmp_path / "out").mkdir()
    plan_huggingface(source, None, file_size=20_000).write(tmp_path / "out", "id", lambda _: None)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    shutil.copy(origin / "config.json", tmp_path / "out")
    open_source(tmp_path / "out").check()
    assert same(read_folder(tmp_path / "out"), read_folder(origin))


class TestMindSpeed:
    """Flags as MindSpeed-LLM's scripts write them."""

    USUAL = ("--use-mcore-models", "--model-type", "GPT")

    def test_its_flags_are_taken(self, tmp_path: Path) -> None:
        origin = write_folder(tmp_path / "origin", config_of("qwen2"))
        flags = ("--spec", "a.b", "c", "--model-type-hf", "llama2", "--add-qkv-bias", "--params-dtype", "bf16")
        to_megatron(origin, tmp_path / "mg", 4, 2, *self.USUAL, *flags, "--tokenizer-model", origin / "tokenizer.json")

    def test_the_original_folder_as_save_dir_gains_mg2hf_and_nothing_else(self, tmp_path: Path) -> None:
        origin = write_folder(tmp_path / "origin", config_of())
        before = {path.name: path.stat().st_mtime_ns for path in origin.iterdir()}
        write_megatron(tmp_path / "mg", config_of(), random_tensors(config_of()), Style(tp=2))
        to_huggingface(tmp_path / "mg", origin, *self.USUAL, "--model-type-hf", "llama2")
        after = {path.name: path.stat().st_mtime_ns for path in origin.iterdir()}
        assert same(read_folder(origin / "mg2hf"), read_folder(origin))
        assert (origin / "mg2hf" / "tokenizer.json").exists()
        assert after.pop("mg2hf") and after == before

    @pytest.mark.parametrize(
        ("flags", "word"),
        [
            (("--no-such-flag",), "--no-such-flag"),
            (("--target-tensor", "2"), "--target-tensor"),
            (("--model-type-hf", "qwen3"), "qwen3, but .* holds a llama model"),
            (("--model-type", "BERT"), "BERT"),
            (("--model-type-hf", "qwen25"), "qwen25, but .* holds a llama model"),
            (("--add-qkv-bias",), "--add-qkv-bias says add_qkv_bias is True, but the checkpoint has False"),
            (("--num-layers", "7"), "--num-layers says num_layers is 7, but the checkpoint has 5"),
            (("--norm-epsilon", "1e-5"), "--norm-epsilon"),
            (("--target-expert-parallel-size", "2"), "1 tensor ranks are not divisible by 2"),
            (("--target-expert-parallel-size", "2", "--target-tensor-parallel-size", "2"), "it has no experts"),
            (("--target-tensor-parallel-size", "3"), "8 attention heads are not divisible by 3"),
            (("--target-pipeline-parallel-size", "6"), "5 layers cannot fill 6"),
            (("--target-pipeline-parallel-size", "2", "--num-layer-list", "3,3"), "sums to 6"),
            (("--num-layer-list", "a,b"), "--num-layer-list"),
            (("--params-dtype", "fp8"), "fp8"),
            (("--tokenizer-model", "/no/such/file"), "/no/such/file"),
            (("--load-model-type", "mg"), "is not a Megatron directory"),
            (("--save-model-type", "hf"), "hf to hf"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], word: str
    ) -> None:
        origin = write_folder(tmp_path / "origin", config_of())
        usual = (
            "--load-model-type",
            "hf",
            "--save-model-type",
            "mg",
            "--load-dir",
            origin,
            "--save-dir",
            tmp_path / "mg",
        )
        assert convert(*usual, *flags) == 2
        assert re.search(word, capsys.readouterr().err)
        assert not (tmp_path / "mg").exists()


def test_the_tools_run_from_any_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "an origin", config_of())
    command = [sys.executable, str(ROOT / "tools/checkpoint/convert_ckpt.py"), "--load-model-type", "hf"]
    command += [
        "--save-model-type",
        "mg",
        "--load-dir",
        "an origin",
        "--save-dir",
        "sp ace/ü",
        "--save-format",
        "safetensors",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"sp ace/ü/{ITERATION}" and "MB/s" in done.stderr
    command = [sys.executable, str(ROOT / "tools/checkpoint/show_ckpt.py"), "--verify", "sp ace/ü"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    for text in (
        "norm_epsilon            3e-05",
        "decoder.layers.4.mlp.linear_fc2.weight  bfloat16  [32, 48]",
        "verified",
    ):
        assert text in shown.stdout
