"""The rows of dense decoders with grouped attention, norms, rotary positions and a gated MLP, by Llama's names."""

from dataclasses import replace

from mindgen.weights.rows import EMBEDDING, HEAD, Row

L = "decoder.layers.{layer}."
H = "model.layers.{layer}."
_Q_K_V = tuple(f"{H}self_attn.{part}_proj" for part in "qkv")


def _weights(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in names)


DENSE = (
    Row(EMBEDDING, "vocab | hidden", ("model.embed_tokens.weight",), split="vocab", stage="first"),
    Row(L + "input_layernorm.weight", "hidden", (H + "input_layernorm.weight",)),
    Row(
        L + "self_attention.linear_qkv.weight",
        "group qkv head_dim | hidden",
        _weights(_Q_K_V),
        split="group",
        pack="qkv",
    ),
    Row(
        L + "self_attention.linear_proj.weight",
        "hidden | group q head_dim",
        (H + "self_attn.o_proj.weight",),
        split="group",
    ),
    Row(L + "pre_mlp_layernorm.weight", "hidden", (H + "post_attention_layernorm.weight",)),
    Row(
        L + "mlp.linear_fc1.weight",
        "gate_up ffn | hidden",
        (H + "mlp.gate_proj.weight", H + "mlp.up_proj.weight"),
        split="ffn",
        pack="gate_up",
    ),
    Row(L + "mlp.linear_fc2.weight", "hidden | ffn", (H + "mlp.down_proj.weight",), split="ffn"),
    Row("decoder.final_layernorm.weight", "hidden", ("model.norm.weight",), stage="last"),
    Row(HEAD, "vocab | hidden", ("lm_head.weight",), split="vocab", stage="last"),
)

QKV_BIAS = (
    Row(
        L + "self_attention.linear_qkv.bias",
        "group qkv head_dim",
        tuple(f"{name}.bias" for name in _Q_K_V),
        split="group",
        pack="qkv",
    ),
)

QK_NORM = (
    Row(L + "self_attention.q_layernorm.weight", "head_dim", (H + "self_attn.q_norm.weight",)),
    Row(L + "self_attention.k_layernorm.weight", "head_dim", (H + "self_attn.k_norm.weight",)),
)


def fuse(rows: tuple[Row, ...], **tensors: str) -> tuple[Row, ...]:
    """The rows with those whose Megatron name ends in a key's (dots as underscores: `linear_qkv`) in one tensor each.

    `tensors` maps a module of Megatron to the Hugging Face module whose weight (or bias) holds all parts of it.
    """
    return tuple(_fused(row, tensors.get(row.name.split(".")[-2])) for row in rows)


def _fused(row: Row, module: str | None) -> Row:
    if module is None:
        return row
    return replace(row, hf=(f"{H}{module}.{row.name.rpartition('.')[2]}",), fused=row.pack is not None)


def rename(rows: tuple[Row, ...], words: dict[str, str]) -> tuple[Row, ...]:
    """The rows with parts of their Hugging Face names replaced, longest first."""

    def renamed(name: str) -> str:
        for old in sorted(words, key=len, reverse=True):
            name = name.replace(old, words[old])
        return name

    return tuple(replace(row, hf=tuple(map(renamed, row.hf))) for row in rows)
