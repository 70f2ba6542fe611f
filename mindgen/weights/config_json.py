"""transformers' `config.json` to a ModelSpec and back. Every field is understood, known to be harmless, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mindgen.spec import DTYPES, ModelSpec, RopeScaling, check_size
from mindgen.weights.families import family_of_config, find_family, model_type_of
from mindgen.weights.families.family import Config, Family
from mindgen.weights.layer_kinds import expert_layers, sliding_layers

_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "sliding_window": "sliding_window",
    "activation": "hidden_act",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_SCALING_FIELDS = {
    "factor": "factor",
    "original_max_positions": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
_ORIGINAL = "original_max_position_embeddings"  # beside the scaling it counts in Phi-3 only, and before that within
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", *_SCALING_FIELDS.values()}
_NEEDED = set(_FIELDS) - {"sliding_window"}
_DEFAULTS: Config = {"tie_word_embeddings": False, "hidden_act": "silu"}
_NULLABLE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}  # where null means none
# Where the computation is the same only for one value.
_REQUIRED: Config = {
    "use_bidirectional_attention": False,
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
}
# Of training, of text, of the library that wrote the file: nothing that changes a forward pass.
_HARMLESS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "attention_dropout", "hidden_dropout", "pretraining_tp", "max_window_layers", "layer_types", "rope_theta",
    "rope_scaling", "rope_parameters", "auto_map", "name_or_path", "torchscript", "return_dict",
    "output_attentions", "output_hidden_states", "use_return_dict", "tokenizer_class", "finetuning_task",
    "task_specific_params", "problem_type", "id2label", "label2id", "use_mrope", "tf_legacy_loss", "use_bfloat16",
    "prefix", "unsloth_fixed", "unsloth_version", "use_sliding_window", "hidden_activation", "cache_implementation",
    "embd_pdrop", "resid_pdrop", "original_max_position_embeddings",
    # Of generation: a request says these, or `generation_config.json` does.
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams",
    "num_beam_groups", "num_return_sequences", "diversity_penalty", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "early_stopping", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_decoder_ids", "output_scores",
    "return_dict_in_generate", "remove_invalid_values",
}  # fmt: skip
_DTYPE_NAMES = {name: name for name in DTYPES} | {f"torch.{name}": name for name in DTYPES}


def spec_from_config(config: Config, dtype: str | None, where: str) -> ModelSpec:
    """What the model of a `config.json` is.

    `dtype` is how the weights are really stored, if the caller has looked; else the file's own word is taken.
    Raises ValueError, naming `where`, for a field that is missing, malformed, or asks for what is not implemented.
    """
    try:
        return _spec(config, dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _spec(config: Config, dtype: str | None) -> ModelSpec:
    name = family_of_config(config)
    family = find_family(name)
    config = family.translate(config) if family.translate else config
    names = _FIELDS | dict(family.names)
    _refuse_contradictions(config)
    config = _with_defaults(config, family, names)
    _refuse_unknown(config, family, names)
    values: Config = {ours: config.get(theirs) for ours, theirs in names.items()}
    missing = [names[ours] for ours, value in values.items() if value is None and ours in _NEEDED]
    if missing:
        raise ValueError(f"states no {', '.join(missing)}; without it the model is not defined")
    values["activation"] = _activation(values["activation"], family)
    _check_second_activation(config, family, names, values["activation"])
    values["sliding_layers"] = sliding_layers(config, family)
    values["expert_layers"] = expert_layers(config)
    theta, scaling = _rope(config, family)
    stated = dtype or _DTYPE_NAMES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), "unknown")
    values |= {"rope_theta": theta, "rope_scaling": scaling, "dtype": stated} | dict(family.fixed)
    return ModelSpec(family=name, **values)


def default_activation(family: Family) -> str:
    """The activation of a family's models whose files do not say."""
    return _activation((_DEFAULTS | dict(family.defaults))[(_FIELDS | dict(family.names))["activation"]], family)


def _activation(name: object, family: Family) -> str:
    known = _ACTIVATIONS | dict(family.activations)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"hidden_act is {name!r}; mindgen implements {', '.join(known)}")
    return known[name]


def _check_second_activation(config: Config, family: Family, names: Mapping[str, str], activation: str) -> None:
    """ValueError if the two words differ: versions of transformers do in which of them counts."""
    second = config.get("hidden_activation")
    if "hidden_activation" not in names.values() and second is not None and _activation(second, family) != activation:
        raise ValueError(f"hidden_activation is {second!r}, but {names['activation']} means {activation}; remove one")


def _with_defaults(config: Config, family: Family, names: Mapping[str, str]) -> Config:
    """The values that transformers' format defines for fields left out: none of them is a guess of ours."""
    stated = {name: value for name, value in config.items() if value is not None or name in _NULLABLE}
    for newer, older in _experts_name(names).items():
        if newer in stated:
            stated[older] = stated.pop(newer)
    filled: Config = _DEFAULTS | dict(family.defaults) | stated
    filled |= _from_rope(filled)
    if family.kv_heads_default:
        filled.setdefault("num_key_value_heads", filled.get("num_attention_heads"))
    hidden, heads = filled.get(names["hidden_size"]), filled.get(names["num_heads"])
    if "head_dim" not in filled and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        if hidden % heads:
            raise ValueError(f"{names['hidden_size']} {hidden} is not divisible by {names['num_heads']} {heads}")
        filled["head_dim"] = hidden // heads
    if not filled.get("use_sliding_window", True):
        filled.pop("sliding_window", None)  # transformers: a window only counts when it is switched on
    if filled.get("sliding_window") is not None and not family.has_window:
        raise ValueError(f"sliding_window is {filled['sliding_window']!r}, which this family does not have")
    return filled


def _experts_name(names: Mapping[str, str]) -> dict[str, str]:
    """transformers 5 writes `num_local_experts` for Qwen3-MoE too."""
    return {"num_local_experts": "num_experts"} if names.get("num_experts") == "num_experts" else {}


def _from_rope(config: Config) -> Config:
    """transformers 5 moved this one in among the parameters of the rope, where it counts before any other."""
    return {name: value for name, value in _rope_parameters(config).items() if name == "partial_rotary_factor"}


def _refuse_contradictions(config: Config) -> None:
    """ValueError if what may stand among the rope's parameters or beside them stands there differently, or as null."""
    within = _rope_parameters(config)
    for name in ("rope_theta", "partial_rotary_factor", _ORIGINAL):
        if name in config and within.get(name) not in (None, config[name]):
            raise ValueError(
                f"{name} is {config[name]!r}, but {within[name]!r} among the parameters of the rope; "
                "remove the one that is wrong"
            )


def _refuse_unknown(config: Config, family: Family, names: Mapping[str, str]) -> None:
    required = {name: value for name, value in (_REQUIRED | dict(family.required)).items() if name not in names}
    known = _HARMLESS | family.harmless | set(names.values())
    for name, value in config.items():
        if name in known:
            continue
        if name in required:
            if value != required[name]:
                unsaid = " (which is what leaving it out means)" if family.defaults.get(name) == value else ""
                raise ValueError(
                    f"{name} is {value!r}{unsaid}; for this family mindgen implements {required[name]!r} only"
                )
        elif value is not None and value is not False and not name.startswith("_") and "token_id" not in name:
            raise ValueError(
                f"{name} is {value!r}, which mindgen does not implement; "
                "remove the field if it does not change the model's computation"
            )


def _rope_parameters(config: Config) -> Config:
    """Old files have `rope_theta` and `rope_scaling`, new ones `rope_parameters`; 10000 is the format's own default."""
    theta, said = config.get("rope_theta", 10000.0), []
    for name in ("rope_scaling", "rope_parameters"):
        parameters = config.get(name) or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"{name} is {parameters!r}; it must be an object")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if parameters:
            said.append({"rope_theta": theta} | parameters | {"rope_type": kind, "type": kind})
    if said and said[0] != said[-1]:
        raise ValueError("rope_scaling and rope_parameters say different things; remove the one that is wrong")
    return said[0] if said else {"rope_theta": theta}


def _rope(config: Config, family: Family) -> tuple[float, RopeScaling | None]:
    parameters = _rope_parameters(config)
    unknown = {name: value for name, value in parameters.items() if name not in _ROPE_FIELDS}
    unknown.pop("truncate", None) if unknown.get("truncate") is True else None
    unknown.pop("partial_rotary_factor", None)
    if unknown:
        raise ValueError(f"rope_parameters has {parameters}, of which mindgen does not implement all")
    theta: Any = parameters["rope_theta"]
    kind = _rope_kind(str(parameters.get("rope_type", "default")), family)
    if kind in ("default", "dynamic"):  # dynamic is plain up to max_positions, which no context of ours exceeds
        return theta, None
    values: dict[str, Any] = {ours: parameters.get(theirs) for ours, theirs in _SCALING_FIELDS.items()}
    if kind == "linear":
        return theta, RopeScaling(kind, values["factor"])
    values["original_max_positions"] = _original(config, values["original_max_positions"], family)
    if kind == "yarn":
        values["beta_fast"] = values["beta_fast"] or 32.0  # transformers' and the paper's own constants
        values["beta_slow"] = values["beta_slow"] or 1.0
    if kind == "longrope":
        return theta, _longrope(values, config)
    return theta, RopeScaling(kind, **values)


def _original(config: Config, within: Any, family: Family) -> int:
    """The original context in tokens: as it stands beside the rope's parameters or within, or else the context."""
    beside = config.get(_ORIGINAL)
    if beside is not None and within is None and _ORIGINAL not in family.defaults:
        raise ValueError(
            f"{_ORIGINAL} is {beside!r}, which counts among the parameters of the rope only; move it there"
        )
    stated = (beside, within, config.get("max_position_embeddings"))
    original: Any = next((number for number in stated if number is not None), None)
    check_size(_ORIGINAL, original)
    return int(original)


def _rope_kind(said: str, family: Family) -> str:
    kind = family.ropes.get(said) if family.ropes else said
    if kind is None:
        raise ValueError(f"rope type {said!r} is not one of this family's, which are {', '.join(family.ropes)}")
    return kind


def _longrope(values: Config, config: Config) -> RopeScaling:
    if values["factor"] is None:
        check_size("max_position_embeddings", config.get("max_position_embeddings"))
        values["factor"] = config["max_position_embeddings"] / values["original_max_positions"]
    for name in ("short_factors", "long_factors"):
        if not isinstance(values[name], list | tuple):
            raise ValueError(f"longrope needs {_SCALING_FIELDS[name]}, a list of numbers; it is {values[name]!r}")
        values[name] = tuple(values[name])
    return RopeScaling("longrope", **values)


def config_from_spec(spec: ModelSpec) -> Config:
    """A `config.json` for a model of which only Megatron's words are known."""
    family = find_family(spec.family)
    if family.translate:
        raise ValueError(
            f"a {model_type_of(spec.family)} model has its own kind of config.json, which mindgen does not make up; "
            "put the model's config.json into the Megatron directory, or name its folder with --tokenizer-name-or-path"
        )
    config: Config = {"architectures": [family.architecture], "model_type": model_type_of(spec.family)}
    config |= dict(family.defaults) | dict(family.required)
    config |= {theirs: getattr(spec, ours) for ours, theirs in (_FIELDS | dict(family.names)).items()}
    config[(_FIELDS | dict(family.names))["activation"]] = _ACTIVATION_NAMES[spec.activation]
    config |= {"torch_dtype": spec.dtype, "rope_theta": spec.rope_theta, "rope_scaling": None}
    has_window = spec.sliding_window is not None
    if "use_sliding_window" in family.defaults:
        config["use_sliding_window"] = has_window
    if spec.sliding_layers is not None or (has_window and family.sliding != "all"):
        config["layer_types"] = [
            "full_attention" if spec.window(layer) is None else "sliding_attention" for layer in range(spec.num_layers)
        ]
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = [layer for layer in range(spec.num_layers) if not spec.has_experts(layer)]
    if spec.rope_scaling is not None:
        values = {theirs: _plain(getattr(spec.rope_scaling, ours)) for ours, theirs in _SCALING_FIELDS.items()}
        config["rope_scaling"] = {"rope_type": spec.rope_scaling.kind}
        config["rope_scaling"] |= {name: value for name, value in values.items() if value is not None}
        config |= {_ORIGINAL: values[_ORIGINAL]} if _ORIGINAL in config else {}
    return _only_if_it_says(spec, config)


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    return list(value) if isinstance(value, tuple) else value


def _only_if_it_says(spec: ModelSpec, config: Config) -> Config:
    """A made-up configuration, or ValueError where the family's format has no word for something."""
    said = _spec(config, spec.dtype)
    differing = [item.name for item in fields(spec) if getattr(said, item.name) != getattr(spec, item.name)]
    if differing:
        values = ", ".join(f"{name} = {getattr(spec, name)!r}" for name in differing)
        raise ValueError(
            f"a config.json of {model_type_of(spec.family)} cannot say {values}; "
            "put the model's own config.json into the Megatron directory"
        )
    return config
