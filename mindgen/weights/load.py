"""Any checkpoint onto any layout: each rank reads the slices that its rows need, and no others."""

from __future__ import annotations

import sys

import torch
from torch import nn
from tqdm import tqdm

from mindgen.parallel.topology import Topology
from mindgen.weights.families import rows_of
from mindgen.weights.rows import Parameter, parameters, shard
from mindgen.weights.source import Source, reader


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
    total = sum(target.numel() * target.element_size() for target in targets.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", disable=not (progress and sys.stderr.isatty())
    ) as bar:
        for parameter in wanted:
            target = targets[parameter.name]
            _fill(target.data, parameter, source, topology)
            bar.update(target.numel() * target.element_size())


def _fill(target: torch.Tensor, parameter: Parameter, source: Source, topology: Topology) -> None:
    read = reader(source, parameter.row, parameter.layer)
    local = shard(parameter.row, read, source.spec, topology.tp_rank, topology.tp)
    assert local.shape == target.shape, f"{parameter.name}: {local.shape} for {target.shape}"
    target.copy_(local)
    if target.dtype == torch.float16 and local.dtype != torch.float16 and torch.isinf(target).any():
        raise ValueError(f"{source.path}: {parameter.name} does not fit fp16; run with --dtype bf16 or fp32")
