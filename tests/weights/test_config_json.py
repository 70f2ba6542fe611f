"""`config.json` is read as transformers reads it, where fields are left out, said twice or malformed too."""

from __future__ import annotations

from typing import Any

import pytest

from mindgen.spec import ModelSpec
from mindgen.weights.config_json import spec_from_config
from tests.checkpoints import CASES, SHAPE, YARN_ROPE, make_model
from tests.weights.test_published import BLOOM, CHATGLM3, GEMMA, GEMMA2, GPT2, PHI3, QWEN
from tests.weights.test_published_experts import MIXTRAL, QWEN3_30B, QWEN15_MOE

LLAMA = SHAPE | {"model_type": "llama", "rms_norm_eps": 1e-2, "rope_theta": 700.0}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 24}
YARN = {name: value for name, value in YARN_ROPE.items() if name != "rope_theta"}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = ["full_attention", "sliding_attention"]


def read(config: dict[str, Any]) -> ModelSpec:
    return spec_from_config(config, "float32", "config.json")


def judged(config: dict[str, Any]) -> ModelSpec:
    """The same configuration with every field stated that transformers fills in."""
    import transformers

    rest = {name: value for name, value in config.items() if name != "model_type"}
    return read(transformers.AutoConfig.for_model(config["model_type"], **rest).to_dict())


OF_TRANSFORMERS = [name for name, case in CASES.items() if not case.original]
WITH_WINDOWS = {"qwen2 window": QWEN2, "qwen3 window": QWEN2 | {"model_type": "qwen3"}}
WITH_WINDOWS |= {
    f"{config['model_type']} window": config | {"use_sliding_window": True, "sliding_window": 24}
    for config in (QWEN15_MOE, QWEN3_30B)
}
PUBLISHED = {"old gemma": GEMMA, "old gemma2": GEMMA2, "old mixtral": MIXTRAL, "old phi3": PHI3}


def full_config(name: str) -> dict[str, Any]:
    others = WITH_WINDOWS | PUBLISHED
    return others[name] if name in others else make_model(name).config.to_dict()


@pytest.mark.parametrize("name", [*OF_TRANSFORMERS, *WITH_WINDOWS, *PUBLISHED])
def test_a_field_left_out_is_what_transformers_says_or_refused(name: str) -> None:
    config = full_config(name)
    assert read(config) == judged(config)
    for field in sorted(config.keys() - {"model_type"}):
        rest = {other: value for other, value in config.items() if other != field}
        try:
            spec = read(rest)
        except ValueError as error:
            assert "config.json: " in str(error)
            continue
        assert spec == judged(rest), field


@pytest.mark.parametrize(
    "config",
    [
        GEMMA | {"hidden_act": "gelu"},
        GEMMA2 | {"hidden_act": "gelu"},
        GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        LLAMA | {"rope_scaling": YARN, "original_max_position_embeddings": 16},
        LLAMA | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        LLAMA | {"rope_scaling": YARN, "rope_parameters": YARN},
        PHI3 | {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.25}},
        PHI3 | {"partial_rotary_factor": 0.5},
        LLAMA | {"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 1.0}},
        QWEN2 | {"layer_types": [*KINDS, *KINDS, "full_attention"]},
        BLOOM | {"hidden_act": "gelu"},
    ],
)
def test_it_is_read_as_transformers_reads_it(config: dict[str, Any]) -> None:
    assert read(config) == judged(config)


def test_of_gemmas_two_words_each_model_has_its_own() -> None:
    assert read(GEMMA | {"hidden_act": "gelu"}).activation == "gelu_tanh"
    assert read(GEMMA2 | {"hidden_act": "gelu"}).activation == "gelu_tanh"
    assert read(GEMMA2 | {"hidden_activation": "gelu"}).activation == "gelu"
    with pytest.raises(ValueError, match="hidden_activation is 'silu', but hidden_act means gelu_tanh"):
        read(GEMMA | {"hidden_activation": "silu"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, "different things"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        (MISTRAL | {"layer_types": [*KINDS, *KINDS, KINDS[0]]}, "all layers have the sliding_window"),
        (MIXTRAL | {"sliding_window": 9, "layer_types": KINDS * 16}, "all layers have the sliding_window"),
        (PHI3 | {"layer_types": KINDS * 16}, "all layers have the sliding_window"),
        (WITH_WINDOWS["qwen3_moe window"] | {"layer_types": KINDS * 24}, "all layers have the sliding_window"),
        (LLAMA | {"logit_scale": 0}, "logit_scale is 0"),
        (CHATGLM3 | {"rope_ratio": "x"}, "rope_ratio is 'x'"),
        (LLAMA | {"hidden_act": []}, r"hidden_act is \[\]"),
        (MISTRAL | {"num_hidden_layers": "x"}, "num_hidden_layers is 'x'"),
        (GEMMA2 | {"num_hidden_layers": 1 << 30}, "num_hidden_layers is 1073741824"),
        (QWEN2 | {"max_window_layers": "x"}, "max_window_layers is 'x'"),
        (QWEN | {"intermediate_size": "x"}, "intermediate_size is 'x'"),
        (BLOOM | {"n_embed": {"a": 1}}, "hidden_size is .*'a'"),
        (GPT2 | {"n_embd": {"a": 1}}, "n_embd is .*'a'"),
    ],
)
def test_what_is_contradictory_or_malformed_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        read(config)


GENERATION = {"max_length": 4096, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_beams": 4}


@pytest.mark.parametrize(
    ("config", "harmless"),
    [
        (LLAMA, GENERATION | {"repetition_penalty": 1.1, "forced_eos_token_id": 2, "min_length": 0}),
        (LLAMA, {"switched_off": False, "unsaid": None}),
        (GPT2, {"predict_special_tokens": True, "output_past": True, "n_special": 0}),
        (CHATGLM3, {"rope_ratio": None}),
        (MISTRAL, {"layer_types": ["sliding_attention"] * 5}),
    ],
)
def test_fields_that_change_nothing(config: dict[str, Any], harmless: dict[str, Any]) -> None:
    assert read(config | harmless) == read(config)
