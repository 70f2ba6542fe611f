"""Megatron's words for what a model is: the flags of its scripts, which are also the names in a checkpoint's `args`.

A *statement* maps fields of ModelSpec to values (`num_layers`, `rope_scaling.factor`, ...), with only what is stated.
`qkv_bias`, `qk_norm` and `padded_vocab_size` are stated too: the first two are a family's, the last a layout's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from mindgen.spec import ModelSpec, RopeScaling
from mindgen.weights.families import find_family

Statement = dict[str, Any]


@dataclass(frozen=True)
class Word:
    """One argument: its flag, its name in `args`, and the field of a statement that it gives a value.

    kind: the type of its value, or None for a switch; then `value` is what giving the switch states.
    """

    flag: str
    attribute: str
    field: str
    kind: type | None = None
    value: Any = None


@dataclass(frozen=True)
class Fixed:
    """An argument that mindgen implements for one value only. `kind` is None for a switch, which states `stated`."""

    flag: str
    attribute: str
    required: Any
    kind: type | None = None
    stated: Any = True


FIXED = (
    Fixed("--position-embedding-type", "position_embedding_type", "rope", str),
    Fixed("--use-rotary-position-embeddings", "use_rotary_position_embeddings", True),
    Fixed("--rotary-percent", "rotary_percent", 1.0, float),
    Fixed("--rotary-interleaved", "rotary_interleaved", False),
    Fixed("--rotary-seq-len-interpolation-factor", "rotary_seq_len_interpolation_factor", 1, int),
    Fixed("--softmax-type", "softmax_type", "vanilla", str),
    Fixed("--swiglu", "swiglu", True),
    Fixed("--normalization", "normalization", "RMSNorm", str),
    Fixed("--disable-bias-linear", "add_bias_linear", False, stated=False),
    Fixed("--apply-layernorm-1p", "apply_layernorm_1p", False),
)
# Set in `args` when the model has what mindgen does not compute yet; 1 and 1.0 leave it as it is.
_UNSUPPORTED = (
    "num_experts", "multi_latent_attention", "squared_relu", "geglu", "gelu_tanh", "post_norm", "embed_layernorm",
    "input_embeds_norm", "add_rmsnorm_offset", "query_pre_attn_scalar", "output_logit_softcapping",
    "attn_logit_softcapping", "interleave_sliding_window", "scale_emb", "dim_model_base", "scale_depth", "use_glm_rope",
    "square_alibi_mask", "add_dense_bias", "add_output_layer_bias", "mtp_num_layers", "noop_layers", "dynamic_factor",
    "heterogeneous_layers_config_path", "attention_output_gate", "window_size", "cla_share_factor", "no_rope_freq",
    "qk_l2_norm", "quick_geglu", "glu_linear_offset", "activation_func_clamp_value", "linear_attention_freq",
    "experimental_attention_variant",
)  # fmt: skip
# Megatron's --use-rope-scaling is Llama 3.1's scaling with these constants.
_MEGATRON_SCALING = {"kind": "llama3", "original_max_positions": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SWITCHES = {"add_qkv_bias": "qkv_bias", "qk_layernorm": "qk_norm"}


def words() -> Iterator[Word]:
    """All words that give a field a value."""
    yield from _field_words(ModelSpec, "")
    yield from _field_words(RopeScaling, "rope_scaling.")
    yield Word("--padded-vocab-size", "padded_vocab_size", "padded_vocab_size", int)
    for attribute, name in _SWITCHES.items():
        yield Word(f"--{attribute.replace('_', '-')}", attribute, name, value=True)


def _field_words(described: type, prefix: str) -> Iterator[Word]:
    kinds = {"int": int, "float": float, "str": str}
    for item in fields(described):
        flags = item.metadata.get("flags", ())
        kind = kinds.get(str(item.type).split(" |")[0])
        for flag in flags:
            yield Word(flag, flag[2:].replace("-", "_"), prefix + item.name, kind, value=None if kind else False)


def add_architecture_flags(parser: argparse.ArgumentParser) -> None:
    """Megatron's architecture flags, as its scripts write them; `given_flags` tells which were used."""
    group = parser.add_argument_group(
        "what the model is", "checked against the checkpoint; they only fill in what a checkpoint does not state"
    )
    for word in words():
        _add(group, word.flag, word.kind)
    for fixed in FIXED:
        _add(group, fixed.flag, fixed.kind)
    _add(group, "--group-query-attention", None)
    _add(group, "--use-rope-scaling", None)


def _add(group: Any, flag: str, kind: type | None) -> None:
    options: dict[str, Any] = {"dest": flag, "default": argparse.SUPPRESS}
    if kind is None:
        group.add_argument(flag, action="store_true", **options)
        return
    optional = flag in _MAY_BE_NONE
    options |= {"metavar": {int: "N", float: "X", str: "NAME"}[kind], "help": "or none" if optional else None}
    group.add_argument(flag, type=_or_none(kind) if optional else kind, **options)


_MAY_BE_NONE = ("--rope-scaling-type", "--sliding-window")


def _or_none(kind: type) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__
    return parse


def given_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """The architecture flags that a command line gave, by flag."""
    return {name: value for name, value in vars(parsed).items() if name.startswith("--")}


def stated_by_flags(flags: dict[str, Any]) -> Statement:
    """What given flags state. Raises ValueError for one that asks for what mindgen does not compute."""
    for fixed in FIXED:
        if fixed.flag in flags:
            value = flags[fixed.flag] if fixed.kind else fixed.stated
            _refuse_unless(value == fixed.required, fixed.flag, value, fixed.required)
    stated: Statement = {}
    if "--use-rope-scaling" in flags:
        stated |= {f"rope_scaling.{name}": value for name, value in _MEGATRON_SCALING.items()}
        stated["rope_scaling.factor"] = 8.0
    if "--group-query-attention" in flags:
        stated["num_kv_heads"] = 1  # Megatron's, unless --num-query-groups says more
    for word in words():
        if word.flag in flags:
            stated[word.field] = flags[word.flag] if word.kind else word.value
    return stated


def stated_by_args(args: dict[str, Any]) -> Statement:
    """What a checkpoint's `args` state.

    None, and False for rope scaling, state nothing: converters leave them so whatever the model is.
    Raises ValueError for a model that mindgen does not compute.
    """
    _refuse_unsupported(args)
    stated = {word.field: _typed(word, args) for word in words() if args.get(word.attribute) is not None}
    if "tie_embeddings" in stated:
        stated["tie_embeddings"] = not stated["tie_embeddings"]
    if not args.get("group_query_attention", stated.get("num_kv_heads", 1) != 1) and "num_heads" in stated:
        stated["num_kv_heads"] = stated["num_heads"]  # whatever num_query_groups says, as in Megatron
    if "rope_scaling.kind" not in stated:
        factor = stated.get("rope_scaling.factor")
        stated = {name: value for name, value in stated.items() if not name.startswith("rope_scaling.")}
        if args.get("use_rope_scaling"):
            stated |= {f"rope_scaling.{name}": value for name, value in _MEGATRON_SCALING.items()}
            stated["rope_scaling.factor"] = factor or 8.0
    return stated


def _typed(word: Word, args: dict[str, Any]) -> Any:
    value, kind = args[word.attribute], word.kind or bool
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # MindSpeed-LLM parses a context length as a float
    if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
        raise ValueError(f"its args have {word.attribute} = {value!r}, which is not of type {kind.__name__}")
    return value


def _refuse_unsupported(args: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        value = args.get(name)
        if value is True or (value and value != 1):
            raise ValueError(f"its args have {name} = {value!r}, which mindgen does not implement")
    turned = args.get("use_rotary_position_embeddings")
    for fixed in FIXED:
        value = args.get(fixed.attribute)
        if value is None or value == fixed.required or fixed.attribute == "use_rotary_position_embeddings":
            continue
        if not (fixed.attribute == "position_embedding_type" and turned):
            _refuse_unless(False, f"args.{fixed.attribute}", value, fixed.required)


def _refuse_unless(fine: bool, name: str, value: Any, required: Any) -> None:
    if not fine:
        raise ValueError(f"{name} is {value!r}; mindgen implements {required!r} only")


def stated_by_spec(spec: ModelSpec) -> Statement:
    """A whole spec as a statement."""
    stated = {name: value for name, value in asdict(spec).items() if name not in ("family", "dtype", "rope_scaling")}
    scaling = asdict(spec.rope_scaling) if spec.rope_scaling else {item.name: None for item in fields(RopeScaling)}
    stated |= {f"rope_scaling.{name}": value for name, value in scaling.items()}
    family = find_family(spec.family)
    return stated | {"qkv_bias": family.qkv_bias, "qk_norm": family.qk_norm}


def check_flags(spec: ModelSpec, flags: dict[str, Any], where: str) -> None:
    """Raises ValueError naming every given flag that contradicts `spec`, both values, and `where` it comes from."""
    true = stated_by_spec(spec)
    problems = []
    for name, value in stated_by_flags(flags).items():
        if name == "padded_vocab_size":
            if value < spec.vocab_size:
                problems.append(f"--padded-vocab-size is {value}, but the vocabulary has {spec.vocab_size} entries")
        elif value != true[name]:
            problems.append(f"{_flag_of(name, flags)} says {name} is {value!r}, but the checkpoint has {true[name]!r}")
    if problems:
        raise ValueError(f"flags contradict {where}: {'; '.join(problems)}. Leave them out: the checkpoint knows")


def _flag_of(field: str, flags: dict[str, Any]) -> str:
    names = [word.flag for word in words() if word.field == field and word.flag in flags]
    if names:
        return names[0]
    return "--use-rope-scaling" if field.startswith("rope_scaling") else "--group-query-attention"


def flag_for(field: str) -> str:
    """The flag that states a field, for messages."""
    return next(word.flag for word in words() if word.field == field)
