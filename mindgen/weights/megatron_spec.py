"""What the model of a Megatron checkpoint is, put together from all that states it; and the `args` that we write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from mindgen.spec import ModelSpec, RopeScaling
from mindgen.weights.families import FAMILIES, find_family
from mindgen.weights.flags import FIXED, Statement, flag_for, stated_by_flags, stated_by_spec, words
from mindgen.weights.manifest import Layout

_OPTIONAL = {f"rope_scaling.{item.name}" for item in fields(RopeScaling)} - {"rope_scaling.kind"}


def merge(found: dict[str, Statement], flags: dict[str, Any]) -> Statement:
    """One statement from those found in files (by where they were found) and from given flags.

    Flags fill in what no file states, and decide where files contradict each other. Raises ValueError, naming values,
    files and flags, for every other contradiction.
    """
    given = stated_by_flags(flags)
    merged, problems = dict(given), []
    for name in sorted({name for statement in found.values() for name in statement}):
        said = {where: statement[name] for where, statement in found.items() if name in statement}
        values = list(said.values())
        agreed = all(value == values[0] for value in values)
        if name == "padded_vocab_size" or (name not in given and agreed):
            merged[name] = values[0]
        elif name not in given or given[name] not in values:
            problems.append(_problem(name, said, given))
    if problems:
        raise ValueError("what the model is, is contradictory:\n  " + "\n  ".join(problems))
    return merged


def _problem(name: str, said: dict[str, Any], given: Statement) -> str:
    parts = [f"{value!r} in {where}" for where, value in said.items()]
    if name in given:
        return f"{name}: {flag_for(name)} says {given[name]!r}, but it is {' and '.join(parts)}"
    decide = f"; {flag_for(name)} can decide" if any(word.field == name for word in words()) else ""
    return f"{name}: {' but '.join(parts)}{decide}"


def spec_from_statement(stated: Statement, family: str, dtype: str, where: str) -> ModelSpec:
    """The spec that a merged statement describes. Raises ValueError naming a flag for every value stated nowhere.

    Two are no guess: a vocabulary of which only the padded size is known is all of that, and a sliding window is there
    only where it is stated, as in Megatron.
    """
    stated = {"vocab_size": stated.get("padded_vocab_size"), "sliding_window": None} | stated
    if stated["vocab_size"] is None:
        del stated["vocab_size"]
    sizes = {item.name for item in fields(ModelSpec)} - {"family", "dtype", "rope_scaling"}
    missing = sorted((sizes | {"rope_scaling.kind"}) - set(stated))
    if missing:
        flags = ", ".join(f"{flag_for(name)} ({name})" for name in missing)
        raise ValueError(
            f"{where} does not state all of what the model is. Put the model's config.json into it, name the folder "
            f"that has one with --tokenizer-name-or-path, or give {flags}. A model without rope scaling takes "
            "--rope-scaling-type none"
        )
    scaling = None
    if stated["rope_scaling.kind"] is not None:
        scaling = RopeScaling(
            **{item.name: stated.get(f"rope_scaling.{item.name}") for item in fields(RopeScaling)}  # type: ignore[arg-type]
        )
    values = {name: stated[name] for name in sizes}
    return ModelSpec(family=family, dtype=dtype, rope_scaling=scaling, **values)


def family_of(names: Iterable[str]) -> str:
    """The family whose rows the names of a shard's tensors are; ValueError if there is none."""
    names = set(names)
    qkv_bias = any(name.endswith("linear_qkv.bias") for name in names)
    qk_norm = any(name.endswith("q_layernorm.weight") for name in names)
    for name, family in FAMILIES.items():
        if (family.qkv_bias, family.qk_norm) == (qkv_bias, qk_norm):
            return name
    raise ValueError("its attention has a bias and norms, which together no family that mindgen knows has")


def args_from_spec(spec: ModelSpec, layout: Layout, divisor: int) -> dict[str, Any]:
    """Megatron's `args` for one of our checkpoints: plain values only, and all that its loaders look at."""
    args: dict[str, Any] = {fixed.attribute: fixed.required for fixed in FIXED}
    stated = stated_by_spec(spec) | {"padded_vocab_size": layout.padded_vocab}
    for word in words():
        args[word.attribute] = stated[word.field]
    args["untie_embeddings_and_output_weights"] = not spec.tie_embeddings
    if float(spec.rope_theta).is_integer():
        args["rotary_base"] = int(spec.rope_theta)
    even = len(set(layout.layers)) == 1
    return args | {
        "add_position_embedding": True,
        "attention_dropout": 0.0,
        "bf16": spec.dtype == "bfloat16",
        "ckpt_format": "torch",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "expert_model_parallel_size": 1,
        "fp16": spec.dtype == "float16",
        "group_query_attention": spec.num_kv_heads != spec.num_heads,
        "hidden_dropout": 0.0,
        "iteration": 1,
        "make_vocab_size_divisible_by": divisor,
        "num_experts": None,
        "num_layer_list": None if even else ",".join(map(str, layout.layers)),
        "pipeline_model_parallel_size": layout.pp,
        "seq_length": spec.max_positions,
        "tensor_model_parallel_size": layout.tp,
        "tokenizer_type": "PretrainedFromHF",
        "transformer_impl": "local",
        "transformer_pipeline_model_parallel_size": layout.pp,
        "use_mcore_models": True,
        "virtual_pipeline_model_parallel_size": None,
    }


def check_family(family: str, weights: str, where: str) -> None:
    """ValueError if a family that was named has other parameters than the weights."""
    named, found = find_family(family), find_family(weights)
    for what, theirs, ours in (("qkv bias", named.qkv_bias, found.qkv_bias), ("qk norm", named.qk_norm, found.qk_norm)):
        if theirs != ours:
            has, but = ("has", "lacks") if theirs else ("has no", "have")
            raise ValueError(f"{where}: model type {family!r} {has} {what}, but the weights {but} it")
