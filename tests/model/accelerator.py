"""A device that is not the CPU, on a host that has none: its tensors say they are on `meta`, and hold their numbers.

They meet those of the CPU only where CUDA allows it: in copies, as indices, and as single numbers. So code that mixes
devices fails here as it fails there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.model.recorded import Recording

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_)
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put)


class OnDevice(Tensor):
    """A tensor of the device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        assert type(held) in (Tensor, torch.nn.Parameter) and held.device.type == "cpu", (
            f"{type(held)} on {held.device}"
        )
        with torch.inference_mode(False):  # views of tensors that were made outside of it want their like
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
            )
        made.held = held
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While it is entered, tensors can be made on DEVICE."""

    def __enter__(self) -> Accelerator:
        self._literals = _Literals()
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._literals.__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Between numbers and tensors: of `torch.tensor` and `tolist` torch asks nobody."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.tensor and options.get("device") == DEVICE:
            return OnDevice(torch.tensor(*args, **options | {"device": "cpu"}))
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].held.tolist()
        return func(*args, **options)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    mine = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if mine and func.overloadpacket not in _COPIES:
        others = [leaf for leaf in _not_indices(func, args, leaves) if not isinstance(leaf, OnDevice)]
        assert all(other.dim() == 0 for other in others), f"{func} has tensors on the CPU and on the device"
    results = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
    lands = asked[-1] == DEVICE if asked else _lands_on_device(func, args, bool(mine))
    if not lands:
        return results
    known = {id(tensor.held): tensor for tensor in mine}  # what is written in place is the same tensor after it
    return tree_map(lambda leaf: known.get(id(leaf), OnDevice(leaf)) if isinstance(leaf, Tensor) else leaf, results)


def _not_indices(func: Any, args: Any, leaves: list[Any]) -> list[Tensor]:
    """The tensors that must be on one device: all but the indices of one on the device, which are brought there."""
    if func.overloadpacket in _INDEXING and isinstance(args[0], OnDevice):
        leaves = tree_leaves((args[0], args[2:]))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _lands_on_device(func: Any, args: Any, has_mine: bool) -> bool:
    """Without a device named: where its tensors are, and a copy where it is written."""
    return isinstance(args[0], OnDevice) if func.overloadpacket in _COPIES else has_mine


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, OnDevice):
        return leaf.held
    return CPU if isinstance(leaf, torch.device) else leaf


class DeviceModule:
    """What torch.cuda is for CUDA: `torch.meta`, while the fixture `accelerator` is in use."""

    def __init__(self) -> None:
        self.num_captured = 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: torch.device) -> None:
        assert device == DEVICE

    def synchronize(self, device: torch.device) -> None:
        assert device == DEVICE

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 1 << 28, 1 << 30

    def max_memory_allocated(self, device: torch.device) -> int:
        return 3 << 28

    def get_device_name(self, device: torch.device) -> str:
        return "a device that is not here"

    def graph_pool_handle(self) -> str:
        return "pool"

    def CUDAGraph(self) -> Graph:
        self.num_captured += 1
        return Graph()

    @contextmanager
    def graph(self, graph: Graph, pool: str, capture_error_mode: str) -> Iterator[None]:
        with graph.recording:
            yield


class Graph:
    """A graph of the device."""

    def __init__(self) -> None:
        self.recording = Recording()

    def replay(self) -> None:
        self.recording()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceModule]:
    """The device, for code on this thread; `pick_device` picks it for every name but cpu."""
    monkeypatch.setattr(torch, "meta", module := DeviceModule(), raising=False)
    monkeypatch.setattr("mindgen.device.pick_device", lambda name, rank=0: CPU if name == "cpu" else DEVICE)
    with Accelerator():
        yield module
