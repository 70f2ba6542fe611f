"""Baichuan and Baichuan 2: queries, keys and values in one tensor; ALiBi in the larger ones, a normalised head in 2.

Their code is not part of transformers. All four sizes have one `model_type` and tell themselves apart in small things.
"""

from mindgen.weights.families.dense import DENSE, fuse
from mindgen.weights.families.family import Config, Family

_VOCABULARY_OF_2 = 125696
_HEADS_OF_13B = 40


def _translate(config: Config) -> Config:
    """ALiBi needs no positions, so the 13B models state none; training's z-loss came with the second generation."""
    has_alibi = "max_position_embeddings" not in config or config.get("num_attention_heads") == _HEADS_OF_13B
    is_second = "z_loss_weight" in config or config.get("vocab_size") == _VOCABULARY_OF_2
    kept = {name: value for name, value in config.items() if name not in ("z_loss_weight", "model_max_length")}
    return (
        {
            "max_position_embeddings": config.get("model_max_length", 4096),
            "num_key_value_heads": config.get("num_attention_heads"),
        }
        | kept
        | {"position_embedding_type": "alibi" if has_alibi else "rope", "normalised_head": is_second}
    )


BAICHUAN = Family(
    "BaichuanForCausalLM",
    fuse(DENSE, linear_qkv="self_attn.W_pack"),
    {"rms_norm_eps": 1e-6},
    names={"positions": "position_embedding_type", "normalised_head": "normalised_head"},
    required={"gradient_checkpointing": False},
    translate=_translate,
)
