"""Every family through the converter, and Megatron directories of new kinds of models as others write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from mindgen.commands.convert import main
from mindgen.weights.huggingface import open_huggingface
from mindgen.weights.megatron import open_megatron
from mindgen.weights.open import open_source
from tests.checkpoints import YARN_ROPE, prompts
from tests.model.test_decoder import difference, logits
from tests.weights.folders import read_folder, same
from tests.weights.foreign import Style
from tests.weights.foreign_families import ARGS, write_family
from tests.weights.test_convert import shards as contents

ITERATION = "iter_0000001"


def convert(kind: str, load: Path, save_kind: str, save: Path, *flags: Any) -> None:
    words = ("--load-model-type", kind, "--save-model-type", save_kind, "--load-dir", load, "--save-dir", save, *flags)
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def shards(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, int], Path]:
    """A case in Megatron's layout, converted once."""
    folder = tmp_path_factory.mktemp("shards")

    def get(name: str, tp: int, pp: int) -> Path:
        target = folder / f"{name} {tp} {pp}"
        if not target.exists():
            sizes = ("--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp)
            convert("hf", checkpoint(name), "mg", target, *sizes)
        return target

    return get


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (4, 1)])
def test_there_and_back_nothing_changes(
    case: str, tp: int, pp: int, checkpoint: Callable[[str], Path], shards: Callable[..., Path], tmp_path: Path
) -> None:
    origin, megatron = checkpoint(case), shards(case, tp, pp)
    convert("mg", megatron, "hf", tmp_path)
    before = {name: value for name, value in read_folder(origin).items() if not name.endswith("inv_freq")}
    assert same(read_folder(tmp_path / "mg2hf"), before)
    assert open_source(tmp_path / "mg2hf").spec == open_source(megatron).spec == open_source(origin).spec
    assert (tmp_path / "mg2hf/config.json").read_bytes() == (origin / "config.json").read_bytes()


def test_shards_of_another_layout_compute_the_same(
    case: str, shards: Callable[..., Path], expected_logits: Callable[[str], list[torch.Tensor]]
) -> None:
    assert difference(logits(shards(case, 2, 2), prompts(1)[0]), expected_logits(case)[0]) < 1e-4


def test_families_of_one_model_type_go_by_that(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--load-model-type", "hf", "--load-dir", checkpoint("glm4_32b"), "--save-model-type", "mg", "--save-dir")
    assert main([str(word) for word in (*words, tmp_path / "one", "--model-type-hf", "glm4")]) == 0
    assert main([str(word) for word in (*words, tmp_path / "two", "--model-type-hf", "glm4_unbiased")]) == 2
    assert "holds a glm4 model" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("glm4", False), ("glm4_32b", True)])
def test_a_family_chosen_wrongly_is_called_by_what_chose_it(
    name: str, said: bool, checkpoint: Callable[[str], Path], shards: Callable[..., Path], tmp_path: Path
) -> None:
    words = rf"\(there are several: attention_bias chooses between them, and is {said} here\)"
    folder = changed(shutil.copytree(checkpoint(name), tmp_path / "hf"), attention_bias=said)
    with pytest.raises(ValueError, match=rf"hold the glm4 model of its config.json {words}:\n"):
        open_source(folder).check()
    origin = shutil.copytree(shards(name, 2, 1), tmp_path / "mg")
    (origin / ITERATION / "mindgen_manifest.json").unlink()
    changed(origin / ITERATION, attention_bias=said)
    with pytest.raises(ValueError, match=rf"model type 'glm4' {words} has "):
        open_source(origin)


def test_what_lacks_a_tensor_is_called_by_the_word_of_its_config(shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(shards("glm4_32b", 1, 1), tmp_path / "mg")
    (folder / ITERATION / "mindgen_manifest.json").unlink()
    file = folder / ITERATION / "mp_rank_00/model_optim_rng.pt"
    shard = torch.load(file, weights_only=False)
    del shard["model"]["decoder.layers.2.mlp.linear_fc2.weight"]
    torch.save(shard, file)
    with pytest.raises(ValueError, match=r"hold the glm4 model that it should \(there .*, and is False here\):\n.*fc2"):
        open_source(folder).check()


def changed(folder: Path, **fields: Any) -> Path:
    """A folder after its `config.json` was given other fields."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_args_alone_say_what_the_model_is(
    case: str, checkpoint: Callable[[str], Path], shards: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(shards(case, 2, 2), tmp_path / "mg")
    assert open_source(with_args_only(folder)).spec == open_source(checkpoint(case)).spec


# Of families whose models are tied where `config.json` does not say: the head's name and the embedding's.
TIED = {
    "gemma": ("lm_head.weight", "model.embed_tokens.weight"),
    "gemma2": ("lm_head.weight", "model.embed_tokens.weight"),
    "bloom": ("lm_head.weight", "transformer.word_embeddings.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
}


@pytest.mark.parametrize("name", TIED)
def test_an_unsaid_tie_is_not_taken_for_one_where_the_head_differs(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = without_field(checkpoint(name), "tie_word_embeddings", tmp_path / "hf")
    head, embedding = TIED[name]
    copied = read_folder(folder)[embedding].clone()
    for tensor in (copied, 2 * copied):
        for index in folder.glob("*.index.json"):
            content = json.loads(index.read_text())
            content["weight_map"][head] = "head.safetensors"
            index.write_text(json.dumps(content))
        save_file({head: tensor}, folder / "head.safetensors")
        if tensor is copied:
            open_source(folder).check()
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding although config.json ties them"):
        open_source(folder).check()


@pytest.mark.parametrize("name", ["llama32", "qwen2", "glm_edge"])
def test_an_unsaid_head_of_its_own_is_not_made_up(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = without_field(checkpoint(name), "tie_word_embeddings", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
        open_source(folder).check()


@pytest.mark.parametrize("factor", [1, 2])
def test_a_head_in_shards_that_are_said_to_be_tied_must_be_a_copy(
    factor: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = read_folder(checkpoint("gemma2"))
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    style = replace(STYLES["2x2"], args=ARGS["gemma2"])
    write_family(tmp_path, "gemma2", SIZES | OF_FAMILY["gemma2"], tensors, style)
    source = open_source(tmp_path, {"--vocab-size": 331, "--rope-scaling-type": None})
    if factor == 1:
        source.check()
        return
    with pytest.raises(ValueError, match=r"output_layer.weight is not a copy of embedding.word_embeddings.weight"):
        source.check()


def without_field(origin: Path, name: str, folder: Path) -> Path:
    """A copy of a folder whose `config.json` does not have a field."""
    shutil.copytree(origin, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop(name, None)  # transformers 4 leaves out what the class has by default
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_args_only(folder: Path) -> Path:
    for name in ("config.json", "mindgen_manifest.json"):
        (folder / ITERATION / name).unlink()
    return folder


FULL, SLIDING = "full_attention", "sliding_attention"
SWITCHED = {"use_sliding_window": True, "sliding_window": 9}
# Changes to a case's `config.json`, where transformers' defaults or Megatron's words would say something else.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, gelu": ("llama31", {"hidden_act": "gelu"}),
    "llama, tanh": ("llama31", {"hidden_act": "gelu_new"}),
    "llama, yarn": (
        "llama31",
        {"rope_parameters": YARN_ROPE | {"rope_theta": 500.0, "attention_factor": 1.25}, "rope_scaling": None},
    ),
    "gpt2, gelu": ("gpt2", {"activation_function": "gelu"}),
    "gemma2, exact": ("gemma2", {"hidden_activation": "gelu"}),
    "gemma2, layers": ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING, FULL, FULL]}),
    "glm, unbiased": ("glm_edge", {}),
    "glm4, unbiased": ("glm4_32b", {}),
    "mistral": ("mistral", {}),
    "mistral, none": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {}),
    "qwen2, later layers": ("qwen25", SWITCHED | {"max_window_layers": 2}),
    "qwen2, all": ("qwen25", SWITCHED | {"max_window_layers": 0}),
    "qwen2, none": ("qwen25", SWITCHED | {"max_window_layers": 5, "layer_types": [FULL] * 5}),
    "qwen3, layers": ("qwen3", SWITCHED | {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING]}),
    "qwen2_moe": ("qwen2_moe", SWITCHED | {"max_window_layers": 3}),
    "qwen3_moe": ("qwen3_moe", SWITCHED | {"max_window_layers": 3}),
}
# What transformers 5 makes of the change to qwen2_moe; transformers 4 knows no kinds of its layers.
ALTERNATING = [SLIDING, FULL, SLIDING, FULL, FULL]


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_args_alone_say_what_is_unusual(
    name: str, changes: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    origin = shutil.copytree(checkpoint(name), tmp_path / "origin")
    config = json.loads((origin / "config.json").read_text())
    config.pop("layer_types", None)  # unless changes have it, those follow from other fields
    (origin / "config.json").write_text(json.dumps(config | changes))
    convert("hf", origin, "mg", tmp_path / "mg", "--target-tensor-parallel-size", 2)
    spec = open_source(origin).spec
    assert open_source(with_args_only(tmp_path / "mg")).spec == spec
    if name == "gpt2":
        return  # of which no config.json is made up
    (tmp_path / "hf").mkdir()
    convert("mg", tmp_path / "mg", "hf", tmp_path / "hf")
    assert open_source(tmp_path / "hf/mg2hf").spec == spec
    said, meant = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "hf/mg2hf", origin))
    if name == "qwen2_moe" and not hasattr(meant, "layer_types"):
        meant.layer_types = ALTERNATING
    for field in ("model_type", "sliding_window", "layer_types", "hidden_activation"):
        assert getattr(said, field, None) == getattr(meant, field, None)


# --- directories that others wrote ------------------------------------------------------------------------------------

SIZES = {
    "num_hidden_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-2, "rope_theta": 700,
}  # fmt: skip
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {"tie_word_embeddings": True},
    "glm": {},
    "bloom": {"num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 256, "max_position_embeddings": 2048}
    | {"rope_theta": 10000, "tie_word_embeddings": True},
}
STYLES = {
    "2x2": Style(tp=2, pp=2, layers=(3, 2), padded_vocab=384),
    "4x1, above 2 groups": Style(tp=4, padded_vocab=332),
}
foreign = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
families = pytest.mark.parametrize("family", OF_FAMILY)


def write_theirs(path: Path, family: str, origin: Path, style: Style) -> Path:
    style = replace(style, args=ARGS[family])
    return write_family(path, family, SIZES | OF_FAMILY[family], read_folder(origin), style)


@foreign
@families
def test_what_others_wrote_is_understood_from_its_args(
    family: str,
    style: Style,
    checkpoint: Callable[[str], Path],
    expected_logits: Callable[[str], list[torch.Tensor]],
    tmp_path: Path,
) -> None:
    origin = checkpoint(family)
    write_theirs(tmp_path / "mg", family, origin, style)
    rope = {} if family == "bloom" else {"--rope-scaling-type": None}
    source = open_megatron(tmp_path / "mg", rope | {"--vocab-size": 331})
    source.check()
    expected = open_huggingface(origin).spec
    assert replace(source.spec, family=expected.family) == expected
    assert source.spec.family == family
    assert difference(logits(tmp_path / "mg", prompts(1)[0], source=source), expected_logits(family)[0]) < 1e-4


@foreign
@families
def test_what_others_wrote_goes_back_to_huggingface(
    family: str, style: Style, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    origin = checkpoint(family)
    write_theirs(tmp_path / "mg", family, origin, style)
    (tmp_path / "hf").mkdir()
    shutil.copy(origin / "config.json", tmp_path / "hf")
    convert("mg", tmp_path / "mg", "hf", tmp_path / "hf")
    assert same(read_folder(tmp_path / "hf/mg2hf"), read_folder(origin))
    assert open_source(tmp_path / "hf/mg2hf").spec == open_source(origin).spec


@foreign
@families
def test_our_shards_are_theirs(family: str, style: Style, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", family, checkpoint(family), style)
    sizes = ("--target-tensor-parallel-size", style.tp, "--target-pipeline-parallel-size", style.pp)
    divisor = style.padded_vocab // style.tp
    convert("hf", checkpoint(family), "mg", tmp_path / "ours", *sizes, "--make-vocab-size-divisible-by", divisor)
    assert same(contents(tmp_path / "ours"), contents(tmp_path / "theirs"))
