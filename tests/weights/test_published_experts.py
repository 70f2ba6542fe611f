"""Published models with experts: their own `config.json` is understood, and the flags of existing scripts agree."""

from __future__ import annotations

from typing import Any

import pytest

from mindgen.weights.config_json import spec_from_config
from mindgen.weights.flags import check_flags
from mindgen.weights.rows import check_divides
from tests.weights.test_published import flags_of

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN15_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
    "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False, "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
QWEN2_57B = QWEN15_MOE | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480, "num_experts_per_tok": 8, "num_experts": 64,
}  # fmt: skip
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral 8x7b": (MIXTRAL, {"num_experts": 8, "experts_per_token": 2, "expert_ffn_size": 14336}),
    "qwen1.5 moe": (QWEN15_MOE, {"num_experts": 60, "expert_ffn_size": 1408, "shared_ffn_size": 5632}),
    "qwen2 57b": (QWEN2_57B, {"experts_per_token": 8, "shared_ffn_size": 20480, "renormalise_experts": False}),
    "qwen3 30b": (QWEN3_30B, {"num_experts": 128, "renormalise_experts": True, "shared_ffn_size": None}),
}
SCRIPTS = {
    "mixtral 8x7b": """
        --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
        --num-query-groups 8 --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss
        --expert-model-parallel-size 1 --rotary-base 1000000 --max-position-embeddings 32768 --swiglu
        --norm-epsilon 1e-05 --position-embedding-type rope --untie-embeddings-and-output-weights
    """,
    "qwen2 57b": """
        --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28 --group-query-attention
        --num-query-groups 4 --num-experts 64 --moe-router-topk 8 --n-shared-experts 8 --shared-expert-gate
        --moe-intermediate-size 2560 --moe-router-load-balancing-type softmax_topk --moe-grouped-gemm
        --moe-layer-freq 1 --first-k-dense-replace 0 --add-qkv-bias --padded-vocab-size 151936 --swiglu
    """,
    "qwen3 30b": """
        --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 --group-query-attention
        --num-query-groups 4 --kv-channels 128 --qk-layernorm --num-experts 128 --moe-router-topk 8
        --moe-ffn-hidden-size 768 --norm-topk-prob --moe-layer-freq ([1]*48) --moe-token-dispatcher-type alltoall
    """,
}
WRONG = {
    "mixtral 8x7b": ("--moe-router-topk 2", "--moe-router-topk 1", "--moe-router-topk says experts_per_token is 1"),
    "qwen2 57b": ("--n-shared-experts 8", "--n-shared-experts 4", "--n-shared-experts says shared_ffn_size is 10240"),
    "qwen3 30b": ("([1]*48)", "([0]*1+[1]*47)", "--moe-layer-freq says expert_layers is"),
}


@pytest.mark.parametrize("model", MODELS)
def test_its_configuration_says_what_it_is(model: str) -> None:
    config, expected = MODELS[model]
    spec = spec_from_config(config, None, "config.json")
    assert {name: getattr(spec, name) for name in expected} == expected
    assert spec.expert_layers is None and spec.sliding_window is None


@pytest.mark.parametrize(
    ("model", "changes", "layers"),
    [
        ("qwen1.5 moe", {"decoder_sparse_step": 8}, (7, 15, 23)),
        ("qwen1.5 moe", {"decoder_sparse_step": 8, "mlp_only_layers": [15]}, (7, 23)),
        ("qwen3 30b", {"mlp_only_layers": list(range(47))}, (47,)),
    ],
)
def test_layers_with_experts(model: str, changes: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert spec_from_config(MODELS[model][0] | changes, None, "config.json").expert_layers == layers


def test_windows_of_models_with_experts() -> None:
    use = {"use_sliding_window": True, "sliding_window": 4096}
    assert spec_from_config(QWEN15_MOE | use | {"max_window_layers": 5}, None, "x").sliding_layers == (0, 2, 4)
    spec = spec_from_config(QWEN3_30B | use, None, "x")
    assert (spec.sliding_window, spec.sliding_layers) == (4096, None)


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        ("mixtral 8x7b", "num_experts_per_tok", 9),
        ("mixtral 8x7b", "num_local_experts", 0),
        ("mixtral 8x7b", "shared_expert_intermediate_size", 16),
        ("qwen1.5 moe", "qkv_bias", False),
        ("qwen1.5 moe", "decoder_sparse_step", 0),
        ("qwen3 30b", "attention_bias", True),
        ("qwen3 30b", "mlp_only_layers", "first"),
        ("qwen3 30b", "routed_scaling_factor", 2.5),
        ("qwen3 30b", "n_group", 8),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(model: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"config.json: .*{value}"):
        spec_from_config(MODELS[model][0] | {name: value}, None, "config.json")


@pytest.mark.parametrize("model", SCRIPTS)
def test_a_scripts_flags_agree_with_the_model_and_are_checked(model: str) -> None:
    spec = spec_from_config(MODELS[model][0], None, "config.json")
    check_flags(spec, flags_of(SCRIPTS[model]), "there")
    right, wrong, words = WRONG[model]
    changed = " ".join(SCRIPTS[model].split()).replace(right, wrong)
    with pytest.raises(ValueError, match=words):
        check_flags(spec, flags_of(changed), "there")


def test_sizes_that_share_out_experts() -> None:
    mixtral, qwen = (spec_from_config(MODELS[name][0], None, "x") for name in ("mixtral 8x7b", "qwen1.5 moe"))
    for tp, ep in ((1, 1), (8, 1), (8, 2), (8, 8), (16, 4)):
        check_divides(mixtral, tp, ep)
    with pytest.raises(ValueError, match=r"8 experts are not divisible by 16. Sizes that fit: 1, 2, 4, 8"):
        check_divides(mixtral, 16, 16)
    with pytest.raises(ValueError, match=r"8 tensor ranks are not divisible by 3. Sizes that fit: 1, 2, 4, 8"):
        check_divides(mixtral, 8, 3)
    with pytest.raises(ValueError, match=r"60 experts are not divisible by 8. Sizes that fit: 1, 2, 4"):
        check_divides(qwen, 8, 8)


@pytest.mark.parametrize("text", ["0", "[1]*3", "[1]*10**9", "__import__('os')", "[1", "1+1", "['a']*48"])
def test_a_list_of_layers_that_is_none_is_refused(text: str) -> None:
    spec = spec_from_config(QWEN3_30B, None, "config.json")
    with pytest.raises(ValueError, match="--moe-layer-freq"):
        check_flags(spec, {"--num-layers": 48, "--moe-layer-freq": text}, "there")
