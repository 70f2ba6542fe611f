"""Mixtral, Qwen2-MoE (Qwen1.5-MoE too) and Qwen3-MoE: experts in place of the MLP, in all layers or in some."""

from dataclasses import replace

from mindgen.weights.families.dense import DENSE, QK_NORM, QKV_BIAS, H, L, rename
from mindgen.weights.families.family import Family
from mindgen.weights.rows import Layers, Row

_MLP = tuple(row for row in DENSE if ".mlp." in row.name)
_REST = tuple(row for row in DENSE if row not in _MLP)


def _mlp(ours: str, theirs: str, ffn: str) -> tuple[Row, ...]:
    """The rows of the MLP at another place of layers with experts, and of another width."""
    rows = rename(_MLP, {"mlp.": f"mlp.{theirs}."})
    return tuple(
        replace(row, name=row.name.replace("mlp.", f"mlp.{ours}."), axes=row.axes.replace("ffn", ffn), split=ffn)
        for row in _in_layers(rows, "experts")
    )


def _in_layers(rows: tuple[Row, ...], layers: Layers) -> tuple[Row, ...]:
    return tuple(replace(row, layers=layers) for row in rows)


_EXPERTS = (
    Row(L + "mlp.router.weight", "expert | hidden", (H + "mlp.gate.weight",), layers="experts"),
    *_mlp("experts.local_experts.{expert}", "experts.{expert}", "expert_ffn"),
)
_SHARED = (
    *_mlp("shared_experts", "shared_expert", "shared_ffn"),
    Row(L + "mlp.shared_experts.gate_weight", "one | hidden", (H + "mlp.shared_expert_gate.weight",), layers="experts"),
)
_MIXTRAL_WORDS = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_NAMES = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_size": "moe_intermediate_size",
    "renormalise_experts": "norm_topk_prob",
}
_SOME_LAYERS = {"decoder_sparse_step": 1, "mlp_only_layers": (), "norm_topk_prob": False}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_OF_TRAINING = frozenset({"router_aux_loss_coef", "output_router_logits", "router_jitter_noise"})
_READ_APART = frozenset({"decoder_sparse_step", "mlp_only_layers"})

MIXTRAL = Family(
    "MixtralForCausalLM",
    _REST + rename(_EXPERTS, _MIXTRAL_WORDS),
    {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6},
    names={
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "intermediate_size",
    },
    fixed={"renormalise_experts": True},
    harmless=_OF_TRAINING,
)
QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    _REST + QKV_BIAS + _in_layers(_MLP, "dense") + _EXPERTS + _SHARED,
    _SOME_LAYERS | _WINDOW | {"max_window_layers": 28, "shared_expert_intermediate_size": 5632, "qkv_bias": True},
    names=_NAMES | {"shared_ffn_size": "shared_expert_intermediate_size"},
    required={"qkv_bias": True},
    sliding="early even",
    harmless=_OF_TRAINING | _READ_APART,
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    _REST + QK_NORM + _in_layers(_MLP, "dense") + _EXPERTS,
    _SOME_LAYERS | _WINDOW | {"head_dim": 128},
    names=_NAMES,
    harmless=_OF_TRAINING | _READ_APART,
)
