"""How to run a model. Command-line flags come from these fields; see mindgen/commands/flags.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from numbers import Real
from operator import index
from typing import Any, SupportsIndex

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as flags say it, as torch does


def option(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """A field of a configuration and what the command line says of it.

    `flags` are its names there (the field's own name with dashes when none is given); `more` may hold `choices`,
    `metavar`, and the `style`: of a tuple `commas` (one value), `repeat` (the flag again) or `several` (after it); of a
    bool `truth`, if the switch takes True or False after it in place of --no before it.
    """
    return field(default=default, metadata={"help": help, "flags": flags} | more)


def flags_of(item: Field[Any]) -> tuple[str, ...]:
    """What a field of a configuration is called on the command line, its first name first."""
    return item.metadata.get("flags") or ("--" + item.name.replace("_", "-"),)


@dataclass(frozen=True)
class EngineConfig:
    """How to run it: over how many ranks, on which device, with how much memory.

    A list is kept as a tuple, and numbers of other types, such as numpy's, as int and float: ranks compare what it
    prints. Raises ValueError for a value of another type or outside its range.
    """

    model: str = option("", "a Hugging Face folder or a Megatron directory of any TP x PP", "--load", "--model")
    tensor_parallel_size: int | None = option(
        None, "ranks that share each layer (default: all ranks)", "--tensor-model-parallel-size"
    )
    pipeline_parallel_size: int = option(1, "stages that share the layers", "--pipeline-model-parallel-size")
    expert_parallel_size: int = option(
        1,
        "groups of tensor ranks that share out the experts; the ranks of a group share each of its experts",
        "--expert-model-parallel-size",
    )
    num_layer_list: tuple[int, ...] | None = option(
        None, "layers of each stage, e.g. 3,2 (default: as even as possible)", metavar="N,N,..."
    )
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "npu"))
    dtype: str | None = option(
        None, "precision of weights and computation (default: as stored)", choices=tuple(PRECISIONS)
    )
    attention: str = option("auto", "attention backend", choices=("auto", "native", "cpu", "sdpa", "reference"))
    use_kv_cache: bool = option(True, "keep keys and values; without it every step recomputes the whole sequence")
    block_size: int = option(128, "tokens of one cache block")
    max_batch_tokens: int = option(2048, "tokens of one forward pass, decodes and prompts together")
    kv_cache_memory: float | None = option(None, "GiB of cache on each rank (default: by --kv-cache-fraction)")
    kv_cache_fraction: float | None = option(
        None,
        "share of the free memory for the cache; the ranks of a host divide it on a CPU, where it is 0.3 by default, "
        "and each has it of its own device on CUDA and NPU, where it is 0.9",
    )
    capture_graphs: bool = option(
        False, "capture the steps of decoding as graphs and replay them, where the device has graphs (CUDA)"
    )
    prefix_reuse: bool = option(True, "compute what prompts begin with in common only once, while the cache has it")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError(f"no model given; {named('model')} names a Hugging Face folder or a Megatron directory")
        for item in fields(self):
            given = getattr(self, item.name)
            kept = _checked(named(item.name), given, str(item.type), item.metadata.get("choices"))
            object.__setattr__(self, item.name, kept)
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size")
        for name in (*sizes, "block_size", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{named(name)} is {value}; it must be at least 1")
        self._check_cache()

    def _check_cache(self) -> None:
        memory, fraction = self.kv_cache_memory, self.kv_cache_fraction
        if memory is not None and not 0 < memory < 2**30:
            raise ValueError(f"{named('kv_cache_memory')} is {memory}; it must be a number of GiB above 0")
        if fraction is None:
            return
        if not 0 < fraction <= 1:
            raise ValueError(f"{named('kv_cache_fraction')} is {fraction}; it must be above 0 and at most 1")
        if memory is not None:
            raise ValueError(
                f"{named('kv_cache_fraction')} {fraction} and {named('kv_cache_memory')} {memory} both say how large "
                "the cache is; give one of them"
            )


def named(name: str) -> str:
    """An option of EngineConfig as messages call it, which reach programs and command lines: keyword and flag."""
    (item,) = (item for item in fields(EngineConfig) if item.name == name)
    return f"{name} ({flags_of(item)[0]})"


def as_whole(value: object) -> int | None:
    """The value as an int, whatever counts as one: numpy's and torch's whole numbers too. None for what does not, a
    truth value included."""
    if isinstance(value, SupportsIndex) and not _is_truth(value):
        with suppress(TypeError):  # an array of several numbers, a tensor of no whole one
            return index(value)
    return None


def as_real(value: object) -> float | None:
    """The value as a float, whatever real number it is, infinity and NaN included. None for anything else, a truth
    value and what is too large for a float included."""
    if isinstance(value, Real) and not _is_truth(value):
        with suppress(OverflowError):
            return float(value)
    return None


def _is_truth(value: object) -> bool:
    """Whether it is a bool, also one of torch or of numpy, where those pass for whole numbers."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _checked(name: str, value: object, annotation: str, choices: Sequence[str] | None) -> object:
    """The value as it is kept. annotation: the field's, such as `int | None`; tuples hold whole numbers."""
    kind, _, optional = annotation.partition(" | ")
    if value is None and optional:
        return None
    if choices is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    if kind.startswith("tuple"):
        return _whole_numbers(name, value)
    kept = _KINDS[kind](value)
    if kept is None:
        raise ValueError(f"{name} is {value!r}; it must be of type {annotation}")
    return kept


def _whole_numbers(name: str, value: object) -> tuple[int, ...]:
    numbers = [as_whole(item) for item in value] if isinstance(value, list | tuple) else []
    kept = tuple(number for number in numbers if number is not None)
    if not kept or len(kept) < len(numbers):
        raise ValueError(f"{name} is {value!r}; it must be a tuple or list of whole numbers, for example (3, 2)")
    return kept


def _whole_or_real(value: object) -> int | float | None:
    whole = as_whole(value)
    return as_real(value) if whole is None else whole


_KINDS: dict[str, Callable[[object], object]] = {
    "int": as_whole,
    "float": _whole_or_real,
    "str": lambda value: value if isinstance(value, str) else None,
    "bool": lambda value: value if isinstance(value, bool) else None,
}
