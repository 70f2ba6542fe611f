"""One shard of a Megatron checkpoint: a file of named tensors, whatever it was written with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mindgen.weights.huggingface import TensorFile
from mindgen.weights.pickles import arguments_of, load_pickle

# Megatron's Transformer-Engine layers keep a norm in the linear layer behind it; MindSpeed-LLM has two names of a gate.
_RENAMED = {
    "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Those of experts have a tensor for each, numbered at the end of its name.
_NUMBERED = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12])\.weight(\d+)")
_NOT_WEIGHTS = ("._extra_state", "rotary_pos_emb.inv_freq")
IDENTITY = "mindgen_shard"  # in `args` or safetensors metadata: which conversion wrote the shard, and its place there


class Tensors(Protocol):
    """Tensors by the names of a file."""

    def describe(self, name: str) -> tuple[tuple[int, ...], str]: ...

    def slice(self, name: str, dim: int, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Shard:
    """An open shard. `names` maps megatron-core's local names to those in the file.

    args: Megatron's arguments as far as they are plain values; empty where the file has none.
    iteration: the training step that the file names, or None.
    """

    path: Path
    names: dict[str, str]
    args: dict[str, Any]
    iteration: int | None
    identity: str | None
    tensors: Tensors

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (`bfloat16`, ...) of a tensor."""
        return self.tensors.describe(self._stored(name))

    def slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The part of a tensor between two bounds of one dimension."""
        return self.tensors.slice(self._stored(name), dim, start, stop)

    def _stored(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"{self.path} holds no tensor {name}")
        return self.names[name]


def open_shard(path: Path) -> Shard:
    """Opens a shard by its suffix. Raises ValueError naming the file for what is damaged or of another format."""
    if path.suffix == ".safetensors":
        file = TensorFile(path)
        return Shard(path, _local_names(path, file.names), {}, None, file.metadata.get(IDENTITY), file)
    return _open_pickle(path)


def _open_pickle(path: Path) -> Shard:
    loaded = load_pickle(path)
    model = loaded.get("model")
    if "model0" in loaded:
        raise ValueError(
            f"{path} was saved with virtual pipeline stages (model0, model1, ...), which mindgen does not read; save "
            "it without --num-layers-per-virtual-pipeline-stage"
        )
    if not isinstance(model, dict):
        raise ValueError(f"{path} has no `model`; it holds {', '.join(sorted(map(str, loaded)))[:200] or 'nothing'}")
    if "language_model" in model:
        raise ValueError(
            f"{path} is in Megatron's legacy format (model['language_model']); convert it to megatron-core's with the "
            "tools that wrote it (--use-mcore-models)"
        )
    version = loaded.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2.0:
        raise ValueError(
            f"{path} has checkpoint_version {version}, whose order of queries, keys and values is older than 2.0; load "
            "and save it once with a current Megatron"
        )
    tensors = {str(name): value for name, value in model.items() if _is_weight(str(name))}
    strange = [name for name, value in tensors.items() if not _is_tensor(value)]
    if strange:
        raise ValueError(f"{path}: {strange[0]} is not an ordinary tensor")
    args, iteration = arguments_of(loaded), loaded.get("iteration")
    identity = args.get(IDENTITY)
    return Shard(path, _local_names(path, tensors), args, iteration, identity, _Mapped(tensors))


def _is_weight(name: str) -> bool:
    return not name.endswith(_NOT_WEIGHTS)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and not (value.is_sparse or value.is_quantized)


def _local_names(path: Path, stored: Any) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in stored:
        local = name
        for theirs, ours in _RENAMED.items():
            if name.endswith(theirs):
                local = name.removesuffix(theirs) + ours
        if match := _NUMBERED.fullmatch(name):
            local = f"{match[1]}local_experts.{match[3]}.{match[2]}.weight"
        if local in names:
            raise ValueError(f"{path} holds both {names[local]} and {name}, which are the same parameter")
        if _is_weight(name):
            names[local] = name
    return names


class _Mapped:
    """Tensors that lie in mapped memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        tensor = self._tensors[name]
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self._tensors[name].detach().narrow(dim, start, stop - start)
