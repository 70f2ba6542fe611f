"""Any checkpoint onto any layout: each rank reads the slices that its rows need, and no others."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mindgen.device import free_memory
from mindgen.parallel.topology import Topology
from mindgen.weights.families import rows_of
from mindgen.weights.rows import Parameter, parameters, shard
from mindgen.weights.source import Source, reader

_AHEAD = 16 << 20  # bytes asked for at a time


def load_weights(
    model: nn.Module,
    source: Source,
    topology: Topology,
    layer_list: tuple[int, ...] | None = None,
    progress: bool = False,
) -> None:
    """Fills every parameter of one rank's stage from `source`, converting to the parameter's dtype.

    Raises ValueError naming the tensor if the checkpoint lacks one, or if a value does not fit the dtype.
    """
    wanted = list(parameters(rows_of(source.spec.family), source.spec, topology, layer_list))
    targets = dict(model.named_parameters())
    names = {parameter.name for parameter in wanted}
    assert names == set(targets), f"rows and modules disagree: {sorted(names ^ set(targets))}"
    total = sum(target.nbytes for target in targets.values())
    hidden = not (progress and sys.stderr.isatty())
    ahead = source.files if topology.tp_rank == 0 and topology.pp == 1 else ()  # one rank asks for what all will read
    with _read_ahead(ahead), tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=hidden) as bar:
        for parameter in wanted:
            target = targets.pop(parameter.name)  # what replaces it is the only copy from then on
            bar.update(target.nbytes)
            _put(model, parameter.name, _read(target, parameter, source, topology))


@contextmanager
def _read_ahead(files: tuple[Path, ...]) -> Iterator[None]:
    """Has the system read `files` into its cache while the weights before are laid out, if there is memory for them."""
    fits = 2 * sum(file.stat().st_size for file in files) < free_memory(torch.device("cpu"))
    done = threading.Event()
    thread = threading.Thread(target=_request, args=(files, done), name="read-ahead", daemon=True)
    if fits and hasattr(os, "posix_fadvise"):
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def _request(files: tuple[Path, ...], done: threading.Event) -> None:
    for file in files:
        with file.open("rb") as opened:
            for start in range(0, file.stat().st_size, _AHEAD):
                if done.is_set():
                    return
                os.posix_fadvise(opened.fileno(), start, _AHEAD, os.POSIX_FADV_WILLNEED)


@runtime_checkable
class TakesWeight(Protocol):
    """A module that lays out its `weight` itself."""

    def take_weight(self, weight: Tensor) -> None: ...


def _read(target: Tensor, parameter: Parameter, source: Source, topology: Topology) -> Tensor:
    """What belongs into `target`, in its dtype; mapped memory of the file where nothing has to be changed."""
    read = reader(source, parameter.row, parameter.layer)
    local = shard(parameter.row, read, source.spec, topology)
    assert local.shape == target.shape, f"{parameter.name}: {local.shape} for {target.shape}"
    converted = local.to(target.dtype)
    if target.dtype == torch.float16 and local.dtype != torch.float16 and torch.isinf(converted).any():
        raise ValueError(f"{source.path}: {parameter.name} does not fit fp16; run with --dtype bf16 or fp32")
    return converted


def _put(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, TakesWeight):
        module.take_weight(weight)
    else:
        module.get_parameter(leaf).data.copy_(weight)
