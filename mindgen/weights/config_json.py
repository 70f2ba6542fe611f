"""transformers' `config.json` to a ModelSpec and back. Every field is understood, known to be harmless, or refused."""

from __future__ import annotations

from typing import Any

from mindgen.spec import DTYPES, ModelSpec, RopeScaling
from mindgen.weights.families import Family, find_family

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
}
_SCALING_FIELDS = {
    "factor": "factor",
    "original_max_positions": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", *_SCALING_FIELDS.values()}
# Where the computation is the same only for one value.
_REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
}
# Of training, of text, of the library that wrote the file: nothing that changes a forward pass.
_HARMLESS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "attention_dropout", "hidden_dropout", "pretraining_tp", "max_window_layers", "layer_types", "rope_theta",
    "rope_scaling", "rope_parameters", "auto_map", "name_or_path", "torchscript", "return_dict",
    "output_attentions", "output_hidden_states", "use_return_dict", "tokenizer_class", "finetuning_task",
    "task_specific_params", "problem_type", "id2label", "label2id", "use_mrope", "tf_legacy_loss", "use_bfloat16",
    "prefix", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
_DTYPE_NAMES = {name: name for name in DTYPES} | {f"torch.{name}": name for name in DTYPES}


def spec_from_config(config: dict[str, Any], dtype: str | None, where: str) -> ModelSpec:
    """What the model of a `config.json` is.

    `dtype` is how the weights are really stored, if the caller has looked; else the file's own word is taken.
    Raises ValueError, naming `where`, for a field that is missing, malformed, or asks for what is not implemented.
    """
    try:
        return _spec(config, dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _spec(config: dict[str, Any], dtype: str | None) -> ModelSpec:
    name = config.get("model_type")
    family = find_family(name)
    config = _with_defaults(config, family)
    _refuse_unknown(config)
    values: dict[str, Any] = {ours: config.get(theirs) for ours, theirs in _FIELDS.items()}
    missing = [_FIELDS[ours] for ours, value in values.items() if value is None and ours != "sliding_window"]
    if missing:
        raise ValueError(f"states no {', '.join(missing)}; without it the model is not defined")
    theta, scaling = _rope(config)
    stated = dtype or _DTYPE_NAMES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), "unknown")
    return ModelSpec(family=str(name), rope_theta=theta, rope_scaling=scaling, dtype=stated, **values)


def _with_defaults(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The values that transformers' format defines for fields left out: none of them is a guess of ours."""
    stated = {name: value for name, value in config.items() if value is not None or name == "sliding_window"}
    filled: dict[str, Any] = {"tie_word_embeddings": False} | family.defaults | stated
    if family.architecture == "LlamaForCausalLM":
        filled.setdefault("num_key_value_heads", filled.get("num_attention_heads"))
    hidden, heads = filled.get("hidden_size"), filled.get("num_attention_heads")
    if "head_dim" not in filled and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        if hidden % heads:
            raise ValueError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        filled["head_dim"] = hidden // heads
    if not filled.get("use_sliding_window", True):
        filled.pop("sliding_window", None)  # transformers: a window only counts when it is switched on
    if filled.get("sliding_window") is not None and "sliding_window" not in family.defaults:
        raise ValueError(f"sliding_window is {filled['sliding_window']!r}, which this family does not have")
    return filled


def _refuse_unknown(config: dict[str, Any]) -> None:
    known = _HARMLESS | set(_FIELDS.values()) | set(_REQUIRED)
    for name, value in config.items():
        if name in _REQUIRED:
            if value != _REQUIRED[name]:
                raise ValueError(f"{name} is {value!r}; for this family mindgen implements {_REQUIRED[name]!r} only")
        elif name not in known and value not in (None, False) and not name.startswith("_") and "token_id" not in name:
            raise ValueError(
                f"{name} is {value!r}, which mindgen does not implement; "
                "remove the field if it does not change the model's computation"
            )
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"layer_types is {str(kinds)[:80]}; it must be a list of names")
    allowed = {"sliding_attention"} if config.get("sliding_window") else {"full_attention"}
    if set(kinds) - allowed:
        raise ValueError(f"layer_types has {', '.join(sorted(set(kinds) - allowed))}, which mindgen does not mix")


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Old files have `rope_theta` and `rope_scaling`, new ones `rope_parameters`; 10000 is the format's own default."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters is {parameters!r}; it must be an object")
    unknown = {name: value for name, value in parameters.items() if name not in _ROPE_FIELDS}
    unknown.pop("truncate", None) if unknown.get("truncate") is True else None
    if unknown.pop("partial_rotary_factor", 1.0) != 1.0 or unknown:
        raise ValueError(f"rope_parameters has {parameters}, of which mindgen does not implement all")
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if kind == "default":
        return theta, None
    values: dict[str, Any] = {ours: parameters.get(theirs) for ours, theirs in _SCALING_FIELDS.items()}
    if kind == "linear":
        return theta, RopeScaling(kind, values["factor"])
    if kind == "yarn":
        values["beta_fast"] = values["beta_fast"] or 32.0  # transformers' and the paper's own constants
        values["beta_slow"] = values["beta_slow"] or 1.0
        values["original_max_positions"] = values["original_max_positions"] or config.get("max_position_embeddings")
    return theta, RopeScaling(kind, **values)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """A `config.json` for a model of which only Megatron's words are known."""
    family = find_family(spec.family)
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": spec.family, "hidden_act": "silu"}
    config |= family.defaults
    config |= {theirs: getattr(spec, ours) for ours, theirs in _FIELDS.items()}
    config["torch_dtype"] = spec.dtype
    config["rope_theta"] = spec.rope_theta
    config["rope_scaling"] = None
    if spec.rope_scaling is not None:
        values = {theirs: getattr(spec.rope_scaling, ours) for ours, theirs in _SCALING_FIELDS.items()}
        config["rope_scaling"] = {"rope_type": spec.rope_scaling.kind}
        config["rope_scaling"] |= {name: value for name, value in values.items() if value is not None}
    return config
