"""Graphs for a device that has none: what a step asked torch for is written down, and done again on the same memory.

As with the graphs of a device, numbers of the host's stay as they were when the step was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class Recording(TorchDispatchMode):
    """Writes down what is asked for while it is entered; to be called to do it again."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a value"
        results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, results))
        return results

    def __call__(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, results in self.operations:
                places = {place(tensor) for tensor in tensors((args, kwargs))}
                again = func(*args, **kwargs)
                for old, new in zip(tensors(results), tensors(again), strict=True):
                    if place(old) not in places:
                        old.copy_(new)


def place(tensor: Tensor) -> int:
    """Where its memory is; packed weights, which nobody writes, do not tell."""
    numbers: Tensor = getattr(tensor, "held", tensor)
    return 0 if numbers.is_mkldnn else numbers.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder:
    """In place of device.Recorder; counts."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.num_captures += 1
        with Recording() as recording:
            result = run()

        def replay() -> None:
            self.num_replays += 1
            recording()

        return replay, result
