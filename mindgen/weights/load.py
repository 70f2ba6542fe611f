"""Any checkpoint onto any layout: each rank reads the slices that its rows need, and no others."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from math import inf
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mindgen.device import free_memory
from mindgen.parallel.topology import Topology
from mindgen.weights.ahead import Job, Room, in_turn, threads
from mindgen.weights.copier import NUM_THREADS, Copier
from mindgen.weights.families import rows_of
from mindgen.weights.pace import Pace
from mindgen.weights.rows import Parameter, parameters, shard
from mindgen.weights.source import Source, reader

_NUM_WAITING = 4  # weights that wait for the disk while others are laid out
_LARGE = 1 << 30  # bytes of files; with less there is nothing to gain
_LEAST_RATE = 5e8  # bytes a second for each thread, which lays out 1e9 of them: the next load takes 2 x at most


def load_weights(
    model: nn.Module,
    source: Source,
    topology: Topology,
    layer_list: tuple[int, ...] | None = None,
    progress: bool = False,
) -> None:
    """Fills every parameter of one rank's stage from `source`, converting to the parameter's dtype.

    Raises ValueError naming the tensor if the checkpoint lacks one, or if a value does not fit the dtype, and naming
    the file if it cannot be read.
    """
    wanted = list(parameters(rows_of(source.spec.family), source.spec, topology, layer_list))
    targets = dict(model.named_parameters())
    names = {parameter.name for parameter in wanted}
    assert names == set(targets), f"rows and modules disagree: {sorted(names ^ set(targets))}"
    total = sum(target.nbytes for target in targets.values())
    targets.clear()  # what replaces a parameter is the only copy from then on
    hidden = not (progress and sys.stderr.isatty())
    with (
        threads(torch.get_num_threads() + _NUM_WAITING, "weights") as workers,
        Copier(source.files, Pace(least_rate(source.files))) as copier,  # ends first, and jobs with it
        closing(in_turn(_jobs(model, wanted, source, topology, copier), total, workers)) as finished,
        tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=hidden) as bar,
    ):
        for num_bytes in finished:
            bar.update(num_bytes)


def least_rate(files: Iterable[Path]) -> float:
    """How many bytes a second each of several requests must deliver, for these files to be read past the cache."""
    size = sum(file.stat().st_size for file in files)
    if 2 * size > free_memory(torch.device("cpu")):
        return 0  # the cache could hardly keep them beside the weights
    return _LEAST_RATE * torch.get_num_threads() / NUM_THREADS if size >= _LARGE else inf


def _jobs(
    model: nn.Module, wanted: list[Parameter], source: Source, topology: Topology, copier: Copier
) -> Iterator[tuple[int, Job]]:
    for parameter in wanted:
        job = partial(_load, model, parameter, source, topology, copier)
        yield model.get_parameter(parameter.name).nbytes, job


@runtime_checkable
class TakesWeight(Protocol):
    """A module that lays out its `weight` itself."""

    def take_weight(self, weight: Tensor) -> None: ...


def _load(
    model: nn.Module, parameter: Parameter, source: Source, topology: Topology, copier: Copier, room: Room
) -> int:
    target = model.get_parameter(parameter.name)
    weight, num_bytes = _read(target, parameter, source, topology, copier, room), target.nbytes
    del target
    _put(model, parameter.name, weight)
    return num_bytes


def _join(copier: Copier, room: Room, dtype: torch.dtype, parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, in `room` and in `dtype`."""
    lengths = [part.shape[dim] for part in parts]
    joined = room.take((*parts[0].shape[:dim], sum(lengths), *parts[0].shape[dim + 1 :]), dtype)
    copier.copy(parts, list(joined.split(lengths, dim)))
    return joined


def _read(
    target: Tensor, parameter: Parameter, source: Source, topology: Topology, copier: Copier, room: Room
) -> Tensor:
    """What belongs into `target`, in its dtype; mapped memory of the file where it is cached and needs no change."""
    join = partial(_join, copier, room, target.dtype)
    local = shard(parameter.row, reader(source, parameter.row, parameter.layer, join), source.spec, topology)
    assert local.shape == target.shape, f"{parameter.name}: {local.shape} for {target.shape}"
    if not room.holds(local) and (local.dtype != target.dtype or copier.is_cold(local)):
        local = join([local], 0)
    narrows = target.dtype == torch.float16 and source.dtype(parameter.row, parameter.layer) != torch.float16
    if narrows and any(torch.isinf(part).any() for part in local.flatten().split(1 << 20)):  # whole: much more memory
        raise ValueError(f"{source.path}: {parameter.name} does not fit fp16; run with --dtype bf16 or fp32")
    return local


def _put(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, TakesWeight):
        module.take_weight(weight)
    else:
        module.get_parameter(leaf).data.copy_(weight)
