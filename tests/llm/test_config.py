"""What a configuration takes, wherever it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from mindgen import LLM, EngineConfig
from mindgen.config import named


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("block_size", "4", r"'4'; it must be of type int"),
        ("tensor_parallel_size", True, r"True; it must be of type int"),
        ("tensor_parallel_size", numpy.bool_(True), r"(np\.)?True_?; it must be of type int"),
        ("block_size", numpy.float64(16), r"(np\.float64\()?16\.0\)?; it must be of type int"),
        ("kv_cache_memory", numpy.bool_(True), r"(np\.)?True_?; it must be of type float"),
        ("num_layer_list", (3, True), r"\(3, True\); it must be a tuple or list of whole numbers"),
        ("dtype", "fp99", r"'fp99'; choose one of fp32, bf16, fp16"),
        ("device", None, r"None; choose one of auto"),
        ("prefix_reuse", "no", r"'no'; it must be of type bool"),
        ("kv_cache_memory", "1", r"'1'; it must be of type float"),
        ("num_layer_list", (), r"\(\); it must be a tuple or list of whole numbers, for example"),
        ("num_layer_list", "3,2", r"'3,2'; it must be a tuple or list of whole numbers"),
        ("num_layer_list", (1, 1.5), r"\(1, 1.5\); it must be a tuple or list of whole numbers"),
    ],
)
def test_a_value_of_another_type_is_named(name: str, value: Any, complaint: str) -> None:
    for make in (EngineConfig, LLM):
        with pytest.raises(ValueError, match=rf"{name} \(--[a-z-]+\) is {complaint}"):
            make("model", **{name: value})


def test_numbers_of_any_type_are_kept_as_pythons_own() -> None:
    """Ranks compare a digest of what a configuration prints."""
    numbers: dict[str, Any] = {
        "block_size": numpy.int64(16), "tensor_parallel_size": numpy.uint8(2), "kv_cache_memory": numpy.float32(0.5),
        "num_layer_list": [numpy.int32(3), 2],
    }  # fmt: skip
    plain = {"block_size": 16, "tensor_parallel_size": 2, "kv_cache_memory": 0.5, "num_layer_list": (3, 2)}
    made, same = EngineConfig("model", **numbers), EngineConfig("model", **plain)
    assert made == same and hash(made) == hash(same) and repr(made) == repr(same)
    for memory in (numpy.int64(4), 4):
        assert "kv_cache_memory=4," in repr(EngineConfig("model", kv_cache_memory=memory))
    share = EngineConfig("model", kv_cache_fraction=numpy.float64(0.25))
    assert type(share.kv_cache_fraction) is float and "kv_cache_fraction=0.25," in repr(share)


def test_a_list_is_kept_as_a_tuple() -> None:
    assert EngineConfig("model", num_layer_list=[3, 2]) == EngineConfig("model", num_layer_list=(3, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [None, 5, True, ["a"]])
def test_what_is_no_model_is_named(model: Any) -> None:
    with pytest.raises(ValueError, match="model is .*; it must be"):
        LLM(model)
    with pytest.raises(ValueError, match=r"model \(--load\) is .*; it must be|no model given"):
        EngineConfig(model)


def test_no_model_says_how_one_is_given() -> None:
    with pytest.raises(ValueError, match=r"no model given; model \(--load\) names a Hugging Face folder"):
        LLM("")


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_messages_call_an_option_by_its_keyword_and_its_first_flag() -> None:
    assert named("num_layer_list") == "num_layer_list (--num-layer-list)"
    assert named("tensor_parallel_size") == "tensor_parallel_size (--tensor-model-parallel-size)"
