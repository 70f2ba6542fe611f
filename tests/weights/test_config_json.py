"""`config.json` is read as transformers reads it, where fields are left out, said twice or malformed too."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from typing import Any

import pytest

from mindgen.spec import ModelSpec
from mindgen.weights.config_json import spec_from_config
from tests.checkpoints import CASES, LONG_ROPE, SHAPE, YARN_ROPE, make_model
from tests.originals import rope_of
from tests.weights.test_published import (
    BAICHUAN,
    BAICHUAN2,
    BAICHUAN2_13B,
    BAICHUAN_13B,
    BLOOM,
    CHATGLM3,
    GEMMA,
    GEMMA2,
    GLM4,
    GLM4_0414,
    GPT2,
    INTERNLM25,
    PHI3,
    QWEN,
)
from tests.weights.test_published_experts import MIXTRAL, QWEN3_30B, QWEN15_MOE

LLAMA = SHAPE | {"model_type": "llama", "rms_norm_eps": 1e-2, "rope_theta": 700.0}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 24}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = ["full_attention", "sliding_attention"]
TWO = "for glm4 mindgen implements True and False only"
ROPES = ("linear", "dynamic", "llama3")
FACTORS = {"short_factor": [1.5] * 48, "long_factor": [2.5] * 48}
ORIGINAL = "original_max_position_embeddings"
LONG = FACTORS | {"type": "longrope"}
LONG_PHI3 = PHI3 | {"max_position_embeddings": 131072, "rope_scaling": LONG}


def without(field: str, config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != field}


def read(config: dict[str, Any]) -> ModelSpec:
    return spec_from_config(config, "float32", "config.json")


def judged(config: dict[str, Any]) -> ModelSpec:
    """The same configuration with every field stated that transformers fills in."""
    import transformers

    rest = deepcopy(without("model_type", config))  # which it writes into
    return read(transformers.AutoConfig.for_model(config["model_type"], **rest).to_dict())


OF_TRANSFORMERS = [name for name, case in CASES.items() if not case.original]
WITH_WINDOWS = {"qwen2 window": QWEN2, "qwen3 window": QWEN2 | {"model_type": "qwen3"}}
WITH_WINDOWS |= {
    f"{config['model_type']} window": config | {"use_sliding_window": True, "sliding_window": 24}
    for config in (QWEN15_MOE, QWEN3_30B)
}
PUBLISHED = {"old gemma": GEMMA, "old gemma2": GEMMA2, "old mixtral": MIXTRAL, "old phi3": PHI3}
PUBLISHED |= {"old glm4": GLM4_0414, "old bloom": BLOOM, "old gpt2": GPT2}


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


# Fields of ModelSpec with a default in some family, and what transformers' configurations call them.
DEFAULTED = {
    "tie_embeddings": ("tie_word_embeddings",),
    "norm_epsilon": ("layer_norm_epsilon",),  # the other families refuse to be without
    "head_dim": ("head_dim",),
    "num_kv_heads": ("num_key_value_heads",),
    "query_scalar": ("query_pre_attn_scalar",),
    "attention_softcap": ("attn_logit_softcapping",),
    "logits_softcap": ("final_logit_softcapping",),
    "num_experts": ("num_local_experts",),
    "experts_per_token": ("num_experts_per_tok",),
    "shared_ffn_size": ("shared_expert_intermediate_size",),
    "renormalise_experts": ("norm_topk_prob",),
}


def attributes(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own class makes of a configuration, in the words of ModelSpec, where it states a value."""
    import transformers

    rest = deepcopy(without("model_type", config))  # which it writes into
    model = transformers.AutoConfig.for_model(config["model_type"], **rest)
    found = {ours: getattr(model, name, None) for ours, names in DEFAULTED.items() for name in names}
    stated = {ours: value for ours, value in found.items() if value is not None}
    rope = rope_of(model)
    stated |= {"rope_theta": rope["rope_theta"], "rotary_percent": rope["partial_rotary_factor"]}
    return stated | {"sliding_window": getattr(model, "sliding_window", None) or None}


@pytest.mark.parametrize("name", [*OF_TRANSFORMERS, *WITH_WINDOWS, *PUBLISHED])
def test_with_all_left_out_that_can_be_the_rest_is_what_transformers_says(name: str) -> None:
    config = full_config(name)
    for field in sorted(config.keys() - {"model_type"}):
        rest = {other: value for other, value in config.items() if other != field}
        try:
            spec = read(rest)
        except ValueError:
            continue
        config = rest
        assert spec == judged(config), field
    spec, said = read(config), attributes(config)
    assert len(config) < 14 and "tie_word_embeddings" not in config
    assert {ours: getattr(spec, ours) for ours in said} == said


@pytest.mark.parametrize(
    "config",
    [
        GEMMA | {"hidden_act": "gelu"},
        GEMMA2 | {"hidden_act": "gelu"},
        GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        LLAMA | {"rope_scaling": YARN_ROPE, ORIGINAL: 32, "rope_theta": 700},
        LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        LLAMA | {"rope_scaling": YARN_ROPE, "rope_parameters": YARN_ROPE},
        PHI3 | {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        LLAMA
        | {"rope_parameters": LONG_ROPE | {"rope_theta": 700.0, "rope_type": "longrope", "factor": 8.0, ORIGINAL: 64}},
        PHI3 | {"partial_rotary_factor": 0.5},
        PHI3 | {"rope_scaling": FACTORS | {"type": "yarn"}},
        LLAMA | {"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 1.0}},
        QWEN2 | {"layer_types": [*KINDS, *KINDS, "full_attention"]},
        BLOOM | {"hidden_act": "gelu"},
        BLOOM | {"pruned_heads": {}},
    ],
)
def test_it_is_read_as_transformers_reads_it(config: dict[str, Any]) -> None:
    assert read(config) == judged(config)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA | {"rope_scaling": LLAMA3},
        without(ORIGINAL, LONG_PHI3) | {"rope_scaling": LONG | {ORIGINAL: 64}},
        LONG_PHI3 | {"rope_scaling": LONG | {"factor": 8.0}},
        PHI3 | {"rope_scaling": FACTORS | {"rope_type": "yarn"}},
    ],
)
def test_it_is_read_as_transformers_5_reads_it(config: dict[str, Any]) -> None:
    pytest.importorskip("transformers", minversion="5", reason="transformers 4 refuses such a rope_scaling")
    assert read(config) == judged(config)


def test_the_first_qwen_is_plain_only_up_to_its_length_unless_it_says_so() -> None:
    unsaid = {name: value for name, value in QWEN.items() if name not in ("use_dynamic_ntk", "use_logn_attn")}
    assert read(unsaid) == read(QWEN) and read(unsaid).max_positions == 8192
    assert read(QWEN | {"use_dynamic_ntk": False}).max_positions == 8192
    assert read(QWEN | {"use_dynamic_ntk": False, "use_logn_attn": False}).max_positions == 32768


def test_what_phi_3_calls_yarn_is_none() -> None:
    spec = read(PHI3 | {"rope_scaling": FACTORS | {"type": "yarn"}})
    assert spec.rope_scaling is not None and spec.rope_scaling.kind == "longrope"
    assert spec.rope_scaling.short_factors == tuple(FACTORS["short_factor"])
    with pytest.raises(ValueError, match="longrope needs short_factor"):
        read(PHI3 | {"rope_scaling": YARN_ROPE | {"factor": 4.0, ORIGINAL: 4096}})


def test_of_gemmas_two_words_each_model_has_its_own() -> None:
    assert read(GEMMA | {"hidden_act": "gelu"}).activation == "gelu_tanh"
    assert read(GEMMA2 | {"hidden_act": "gelu"}).activation == "gelu_tanh"
    assert read(GEMMA2 | {"hidden_activation": "gelu"}).activation == "gelu"
    with pytest.raises(ValueError, match="hidden_activation is 'silu', but hidden_act means gelu_tanh"):
        read(GEMMA | {"hidden_activation": "silu"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"rope_scaling": YARN_ROPE, "rope_parameters": YARN_ROPE | {"factor": 2.0}}, "different things"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        (MISTRAL | {"layer_types": [*KINDS, *KINDS, KINDS[0]]}, "all layers have the sliding_window"),
        (MIXTRAL | {"sliding_window": 9, "layer_types": KINDS * 16}, "all layers have the sliding_window"),
        (PHI3 | {"layer_types": KINDS * 16}, "all layers have the sliding_window"),
        (WITH_WINDOWS["qwen3_moe window"] | {"layer_types": KINDS * 24}, "all layers have the sliding_window"),
        (LLAMA | {"logit_scale": 0}, "logit_scale is 0"),
        (LLAMA | {"pruned_heads": {"0": [1]}}, "pruned_heads is .*implements {} only"),
        (CHATGLM3 | {"rope_ratio": "x"}, "rope_ratio is 'x'"),
        (LLAMA | {"hidden_act": []}, r"hidden_act is \[\]"),
        (MISTRAL | {"num_hidden_layers": "x"}, "num_hidden_layers is 'x'"),
        (GEMMA2 | {"num_hidden_layers": 1 << 30}, "num_hidden_layers is 1073741824"),
        (QWEN2 | {"max_window_layers": "x"}, "max_window_layers is 'x'"),
        (QWEN | {"intermediate_size": "x"}, "intermediate_size is 'x'"),
        (QWEN | {"seq_length": None}, "states no seq_length"),
        *((GLM4_0414 | {"attention_bias": said}, f"attention_bias is {said!r}; {TWO}") for said in (3, None, "false")),
        (LLAMA | {"model_type": "glm4_unbiased"}, "'glm4_unbiased' is not supported"),
        (LLAMA | {"rope_scaling": {"type": "su"} | FACTORS}, "'su' is not implemented"),
        *((PHI3 | {"rope_scaling": LLAMA3 | {"rope_type": kind}}, f"'{kind}' is not one of") for kind in ROPES),
        (without("max_position_embeddings", BAICHUAN), "states no max_position_embeddings"),
        (without("max_position_embeddings", BAICHUAN2), "states no max_position_embeddings"),
        (BAICHUAN | {"position_embedding_type": "learned_absolute"}, "it must be alibi or rope"),
        (BLOOM | {"n_embed": {"a": 1}}, "hidden_size is .*'a'"),
        (GPT2 | {"n_embd": {"a": 1}}, "n_embd is .*'a'"),
    ],
)
def test_what_is_contradictory_or_malformed_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        read(config)


PARTS = {"partial_rotary_factor": 0.25}
HUGE = 10**400


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PHI3 | {"rope_parameters": {"rope_theta": 7.0}}, "rope_theta is 10000.0, but 7.0 among"),
        (GLM4_0414 | {"rope_parameters": PARTS}, "partial_rotary_factor is 0.5, but 0.25 among"),
        (PHI3 | {"partial_rotary_factor": 0.5, "rope_scaling": LONG | PARTS}, "partial_rotary_factor is 0.5, but 0.25"),
        *(
            (LLAMA | {"rope_scaling": YARN_ROPE, ORIGINAL: said}, f"{ORIGINAL} is {said}, but 32 among")
            for said in (16, None)
        ),
        *((LONG_PHI3 | {"rope_scaling": LONG | {ORIGINAL: 64}, ORIGINAL: said}, "but 64 among") for said in (32, None)),
        (LLAMA | {"rope_scaling": LLAMA3, ORIGINAL: 16}, f"{ORIGINAL} is 16, which counts among"),
        (LLAMA | {"rope_scaling": without(ORIGINAL, YARN_ROPE), ORIGINAL: 16}, f"{ORIGINAL} is 16, which counts among"),
    ],
)
def test_a_rope_described_twice_and_differently_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        read(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({ORIGINAL: said}, f"{ORIGINAL} is {said!r}; it must be a whole number") for said in (0, "64", 64.0, HUGE)),
        *(({"max_position_embeddings": said}, f"max_position_embeddings is {said!r}") for said in ("9", 9.0, HUGE)),
        ({ORIGINAL: 1}, "original_max_positions is 1; longrope"),
        *(({"factor": said}, f"factor is {said!r}") for said in (0, 1e-300, "8")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_longrope_of_impossible_lengths_is_refused_by_the_field(changes: dict[str, Any], words: str) -> None:
    scaling = LONG | {name: value for name, value in changes.items() if name == "factor"}
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        read(LONG_PHI3 | changes | {"rope_scaling": scaling})


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
@pytest.mark.parametrize("number", [0, -1.0, math.nan, math.inf, "1.0", None, True, 1e-300, 1e300])
def test_a_factor_that_no_frequency_can_be_divided_by_is_refused(name: str, number: Any) -> None:
    with pytest.raises(
        ValueError, match=f"config.json: a rope scaling factor is {re.escape(repr(number))}; it must be a number"
    ):
        read(LONG_PHI3 | {"rope_scaling": LONG | {name: [1.5] * 47 + [number]}})


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
@pytest.mark.parametrize("factors", [dict.fromkeys(range(1, 49), 1.5), "1" * 48, 48, None])
def test_factors_that_are_no_list_are_refused(name: str, factors: Any) -> None:
    with pytest.raises(ValueError, match=f"config.json: longrope needs {name}, a list of numbers"):
        read(LONG_PHI3 | {"rope_scaling": LONG | {name: factors}})


def test_alibi_is_for_baichuans_13b_models_or_where_it_is_said() -> None:
    assert read(BAICHUAN_13B | {"max_position_embeddings": 2048}).positions == "alibi"
    twelve = BAICHUAN | {"hidden_size": 96, "num_attention_heads": 12}
    assert read(twelve).positions == "rope"
    assert read(twelve | {"position_embedding_type": "alibi"}).positions == "alibi"
    assert read(without("model_max_length", BAICHUAN_13B)).max_positions == 4096


# What the original code of a family takes for a field left out, of those that mindgen does not insist on.
OF_THEIR_OWN = {
    "chatglm": {"kv_channels": 128, "multi_query_attention": False, "multi_query_group_num": 1, "rope_ratio": 1}
    | {"add_qkv_bias": False, "tie_word_embeddings": False},
    "baichuan": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "model_max_length": 4096},
    "internlm2": {"num_key_value_heads": None, "hidden_act": "silu", "tie_word_embeddings": False}
    | {"rope_theta": 10000, "rope_scaling": None, "bias": True},
    "qwen": {"layer_norm_epsilon": 1e-6, "kv_channels": 128, "rotary_pct": 1.0, "rotary_emb_base": 10000}
    | {"use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "tie_word_embeddings": False},
}
ORIGINALS = {
    "chatglm3": CHATGLM3 | {"num_attention_heads": 16, "rope_ratio": 3},
    "chatglm3, narrow": CHATGLM3 | {"kv_channels": 64},
    "glm-4": GLM4 | {"multi_query_group_num": 4},
    "baichuan": BAICHUAN | {"rms_norm_eps": 1e-5},
    "baichuan2": BAICHUAN2 | {"hidden_act": "gelu"},
    "baichuan 13b": BAICHUAN_13B | {"model_max_length": 8192},
    "baichuan2 13b": BAICHUAN2_13B,
    "internlm2.5": INTERNLM25 | {"hidden_act": "gelu"},
    "qwen, narrow": QWEN | {"kv_channels": 64},
    "qwen": QWEN | {"num_attention_heads": 16, "rotary_pct": 0.5, "rotary_emb_base": 700, "layer_norm_epsilon": 1e-5},
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_field_left_out_is_what_the_original_code_says_or_refused(name: str) -> None:
    config = ORIGINALS[name]
    defaults, unread = OF_THEIR_OWN[config["model_type"]], []
    for field in sorted(config.keys() - {"model_type"}):
        stated = without(field, config) | ({field: defaults[field]} if field in defaults else {})
        try:
            spec = read(without(field, config))
        except ValueError:
            unread.append(field)
            continue
        assert spec == read(stated), field
        assert field in defaults or spec == read(config), field
    insisted = {"hidden_size", "num_attention_heads"}
    assert insisted < set(unread) and len(unread) < 11


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
