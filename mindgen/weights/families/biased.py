"""Bloom and GPT-2: LayerNorm, biases everywhere, an MLP without a gate; ALiBi or learned positions."""

from mindgen.weights.families.dense import L
from mindgen.weights.families.family import Config, Family, whole
from mindgen.weights.rows import EMBEDDING, HEAD, Row, Stage

_T = "transformer."
_H = "transformer.h.{layer}."


def _norm(ours: str, theirs: str, stage: Stage = "layer") -> tuple[Row, ...]:
    return tuple(Row(f"{ours}.{part}", "hidden", (f"{theirs}.{part}",), stage=stage) for part in ("weight", "bias"))


def _linear(ours: str, theirs: str, axes: str, split: str, is_gpt2: bool, pack: str | None = None) -> tuple[Row, ...]:
    """A weight and its bias, which has the outputs' axes, and their split if that is one of them."""
    outputs, pack = axes.split(" | ")[0], pack if is_gpt2 else None
    weight = Row(f"{ours}.weight", axes, (f"{theirs}.weight",), split, pack, fused=bool(pack), transposed=is_gpt2)
    inner = split if split in outputs.split() else None
    return weight, Row(f"{ours}.bias", outputs, (f"{theirs}.bias",), inner, pack, fused=bool(pack))


def _rows(embedding: str, norms: tuple[str, str], modules: tuple[str, ...], is_gpt2: bool = False) -> tuple[Row, ...]:
    """GPT-2 has its queries, keys and values one after the other, and all weights transposed."""
    qkv, proj, up, down = (_H + module for module in modules)
    return (
        Row(EMBEDDING, "vocab | hidden", (f"{_T}{embedding}.weight",), split="vocab", stage="first"),
        *_norm(L + "input_layernorm", _H + norms[0]),
        *_linear(L + "self_attention.linear_qkv", qkv, "group qkv head_dim | hidden", "group", is_gpt2, "qkv"),
        *_linear(L + "self_attention.linear_proj", proj, "hidden | group q head_dim", "group", is_gpt2),
        *_norm(L + "pre_mlp_layernorm", _H + norms[1]),
        *_linear(L + "mlp.linear_fc1", up, "ffn | hidden", "ffn", is_gpt2),
        *_linear(L + "mlp.linear_fc2", down, "hidden | ffn", "ffn", is_gpt2),
        *_norm("decoder.final_layernorm", _T + "ln_f", stage="last"),
        Row(HEAD, "vocab | hidden", ("lm_head.weight",), split="vocab", stage="last"),
    )


def _translate_bloom(config: Config) -> Config:
    """Old files call things as Megatron-DeepSpeed did; whatever they say of the activation, it is always one."""
    words = {"n_head": "num_attention_heads", "n_embed": "hidden_size"}
    older = {theirs: config[name] for name, theirs in words.items() if config.get(name) is not None}
    config = {name: value for name, value in config.items() if name not in (*words, "hidden_act")} | older
    inner = 4 * whole(config, "hidden_size")
    return {"num_key_value_heads": config.get("num_attention_heads"), "intermediate_size": inner} | config


def _translate_gpt2(config: Config) -> Config:
    inner = config.get("n_inner") or 4 * whole(config, "n_embd")
    config = {name: value for name, value in config.items() if name != "n_inner"}
    return {"num_key_value_heads": config.get("n_head"), "intermediate_size": inner} | config


_FIXED = {"normalization": "LayerNorm"}
_EPSILON = {"norm_epsilon": "layer_norm_epsilon", "num_layers": "n_layer"}
_TIED = {"tie_word_embeddings": True}

BLOOM = Family(
    "BloomForCausalLM",
    _rows(
        "word_embeddings",
        ("input_layernorm", "post_attention_layernorm"),
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
    + _norm("embedding.word_embeddings.norm", _T + "word_embeddings_layernorm", stage="first"),
    _TIED | {"seq_length": 2048, "hidden_act": "gelu_new", "layer_norm_epsilon": 1e-5},
    names=_EPSILON | {"max_positions": "seq_length"},
    fixed=_FIXED | {"positions": "alibi"},
    required={"apply_residual_connection_post_layernorm": False},
    harmless=frozenset(
        {"slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi"}
        | {"skip_bias_add", "skip_bias_add_qkv", "n_inner", "unk_token_id"}
    ),
    translate=_translate_bloom,
    prefix=_T,
)
GPT2 = Family(
    "GPT2LMHeadModel",
    (
        *_rows("wte", ("ln_1", "ln_2"), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), is_gpt2=True),
        Row("embedding.position_embeddings.weight", "position | hidden", (_T + "wpe.weight",), stage="first"),
    ),
    _TIED | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    names=_EPSILON
    | {"hidden_size": "n_embd", "num_heads": "n_head", "max_positions": "n_positions"}
    | {"activation": "activation_function"},
    fixed=_FIXED | {"positions": "learned_absolute"},
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    harmless=frozenset(
        {"reorder_and_upcast_attn", "attn_pdrop", "n_ctx", "summary_type", "summary_use_proj", "summary_activation"}
        | {"summary_proj_to_labels", "summary_first_dropout", "hidden_act", "predict_special_tokens", "output_past"}
        | {"n_special"}
    ),
    translate=_translate_gpt2,
    prefix=_T,
)
