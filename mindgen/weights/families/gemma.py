"""Gemma and Gemma 2: norms stored as differences from one, scaled embeddings; soft caps and sandwich norms in 2."""

from mindgen.weights.families.dense import DENSE, H, L, rename
from mindgen.weights.families.family import Family
from mindgen.weights.rows import Row

_FIXED = {"norm_offset": True, "embedding_scale": True}
_DEFAULTS = {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256}
# The names of Megatron's own layers are taken by the norms before; those after are MindSpeed-LLM's --post-norm.
SANDWICH = (
    Row(L + "post_attn_norm.weight", "hidden", (H + "post_attention_layernorm.weight",)),
    Row(L + "post_mlp_layernorm.weight", "hidden", (H + "post_feedforward_layernorm.weight",)),
)

GEMMA = Family("GemmaForCausalLM", DENSE, _DEFAULTS, fixed=_FIXED, activations={"gelu": "gelu_tanh"})
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    rename(DENSE, {"post_attention_layernorm": "pre_feedforward_layernorm"}) + SANDWICH,
    _DEFAULTS
    | {"sliding_window": 4096, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh"}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    names={
        "activation": "hidden_activation",
        "query_scalar": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping",
        "logits_softcap": "final_logit_softcapping",
    },
    fixed=_FIXED,
    sliding="even",
    harmless=frozenset({"sliding_window_size", "hidden_act"}),  # second names; the first ones count
)
