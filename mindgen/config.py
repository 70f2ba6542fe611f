"""How to run a model. Command-line flags come from these fields; see mindgen/commands/flags.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as flags say it, as torch does


def option(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """A field of a configuration and what the command line says of it.

    `flags` are its names there (the field's own name with dashes when none is given); `more` may hold `choices`,
    `metavar`, and the `style`: of a tuple `commas` (one value), `repeat` (the flag again) or `several` (after it); of a
    bool `truth`, if the switch takes True or False after it in place of --no before it.
    """
    return field(default=default, metadata={"help": help, "flags": flags} | more)


@dataclass(frozen=True)
class EngineConfig:
    """How to run it: over how many ranks, on which device, with how much memory. Raises ValueError for bad sizes."""

    model: str = option("", "a Hugging Face folder or a Megatron directory of any TP x PP", "--load", "--model")
    tensor_parallel_size: int | None = option(
        None, "ranks that share each layer (default: all ranks)", "--tensor-model-parallel-size"
    )
    pipeline_parallel_size: int = option(1, "stages that share the layers", "--pipeline-model-parallel-size")
    num_layer_list: tuple[int, ...] | None = option(
        None, "layers of each stage, e.g. 3,2 (default: as even as possible)", metavar="N,N,..."
    )
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "npu"))
    dtype: str | None = option(
        None, "precision of weights and computation (default: as stored)", choices=tuple(PRECISIONS)
    )
    attention: str = option("auto", "attention backend", choices=("auto", "cpu", "sdpa", "reference"))
    use_kv_cache: bool = option(True, "keep keys and values; without it every step recomputes the whole sequence")
    block_size: int = option(128, "tokens of one cache block")
    max_batch_tokens: int = option(2048, "tokens of one forward pass, decodes and prompts together")
    kv_cache_memory: float | None = option(None, "GiB of cache on each rank (default: by --kv-cache-fraction)")
    kv_cache_fraction: float | None = option(
        None,
        "share of the free memory for the cache; the ranks of a host divide it on a CPU, where it is 0.3 by default, "
        "and each has it of its own device on CUDA and NPU, where it is 0.9",
    )
    prefix_reuse: bool = option(True, "compute what prompts begin with in common only once, while the cache has it")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("no model given; name a Hugging Face folder or a Megatron directory with --load")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "block_size", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.kv_cache_memory is not None and not 0 < self.kv_cache_memory < 2**30:
            raise ValueError(f"kv_cache_memory is {self.kv_cache_memory}; it must be a number of GiB above 0")
        self._check_fraction()

    def _check_fraction(self) -> None:
        fraction = self.kv_cache_fraction
        if fraction is None:
            return
        if not 0 < fraction <= 1:
            raise ValueError(f"kv_cache_fraction is {fraction}; it must be above 0 and at most 1")
        if self.kv_cache_memory is not None:
            raise ValueError(
                f"kv_cache_fraction {fraction} and kv_cache_memory {self.kv_cache_memory} both say how large the cache "
                "is; give one of them"
            )
