"""The rows of dense decoders with grouped attention, RMSNorm, rotary positions and a gated MLP."""

from mindgen.weights.rows import EMBEDDING, HEAD, Row

_L = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_Q_K_V = tuple(f"{_H}self_attn.{part}_proj" for part in "qkv")


def _weights(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in names)


DENSE = (
    Row(EMBEDDING, "vocab | hidden", ("model.embed_tokens.weight",), split="vocab", stage="first"),
    Row(_L + "input_layernorm.weight", "hidden", (_H + "input_layernorm.weight",)),
    Row(
        _L + "self_attention.linear_qkv.weight",
        "group qkv head_dim | hidden",
        _weights(_Q_K_V),
        split="group",
        pack="qkv",
    ),
    Row(
        _L + "self_attention.linear_proj.weight",
        "hidden | group q head_dim",
        (_H + "self_attn.o_proj.weight",),
        split="group",
    ),
    Row(_L + "pre_mlp_layernorm.weight", "hidden", (_H + "post_attention_layernorm.weight",)),
    Row(
        _L + "mlp.linear_fc1.weight",
        "gate_up ffn | hidden",
        (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        split="ffn",
        pack="gate_up",
    ),
    Row(_L + "mlp.linear_fc2.weight", "hidden | ffn", (_H + "mlp.down_proj.weight",), split="ffn"),
    Row("decoder.final_layernorm.weight", "hidden", ("model.norm.weight",), stage="last"),
    Row(HEAD, "vocab | hidden", ("lm_head.weight",), split="vocab", stage="last"),
)

QKV_BIAS = (
    Row(
        _L + "self_attention.linear_qkv.bias",
        "group qkv head_dim",
        tuple(f"{name}.bias" for name in _Q_K_V),
        split="group",
        pack="qkv",
    ),
)

QK_NORM = (
    Row(_L + "self_attention.q_layernorm.weight", "head_dim", (_H + "self_attn.q_norm.weight",)),
    Row(_L + "self_attention.k_layernorm.weight", "head_dim", (_H + "self_attn.k_norm.weight",)),
)
