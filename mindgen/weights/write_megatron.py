"""Writing a Megatron directory: one file for each tensor rank of each stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mindgen.parallel.topology import Topology, split_layers
from mindgen.weights.chunks import Cut
from mindgen.weights.families import rows_of
from mindgen.weights.manifest import FileRecord, Layout
from mindgen.weights.megatron import shard_identity
from mindgen.weights.megatron_directory import NAMES, shard_name
from mindgen.weights.megatron_spec import args_from_spec
from mindgen.weights.rows import Parameter, axis_sizes, check_divides, padded_vocab, parameters
from mindgen.weights.shards import IDENTITY
from mindgen.weights.source import Source, reader
from mindgen.weights.writers import Advance, Entry, Plan, converted, write_safetensors, write_torch

ITERATION = 1  # what Megatron's own converters write


def plan_megatron(
    source: Source,
    tp: int,
    pp: int,
    layer_list: tuple[int, ...] | None,
    divisor: int,
    save_format: str,
    dtype: torch.dtype | None,
) -> Plan:
    """What to write for `tp` x `pp` ranks. `dtype` None keeps what is stored, tensor by tensor.

    The vocabulary is padded to a multiple of `divisor * tp`. Raises ValueError if the model does not divide.
    """
    spec = source.spec if dtype is None else replace(source.spec, dtype=str(dtype).removeprefix("torch."))
    check_divides(spec, tp)
    layers = tuple(len(stage) for stage in split_layers(spec.num_layers, pp, layer_list))
    layout = Layout(tp, pp, layers, padded_vocab(spec.vocab_size, tp, divisor), save_format)
    shards = {
        (stage, rank): _entries(source, layout, Topology(stage * tp + rank, tp, pp), dtype)
        for stage in range(pp)
        for rank in range(tp)
    }

    def write(folder: Path, conversion: str, advance: Advance) -> dict[str, FileRecord]:
        files = {}
        for (stage, rank), entries in shards.items():
            name = f"{shard_name(stage, rank, pp)}/{NAMES[save_format]}"
            identity = {IDENTITY: shard_identity(conversion, stage, rank)}
            (folder / name).parent.mkdir()
            if save_format == "safetensors":
                files[name] = write_safetensors(folder / name, entries, identity, advance)
            else:
                args = args_from_spec(spec, layout, divisor) | identity
                files[name] = write_torch(folder / name, entries, args, ITERATION, advance)
        return files

    return Plan(spec, layout, sum(entry.size for entries in shards.values() for entry in entries), write)


def _entries(source: Source, layout: Layout, topology: Topology, dtype: torch.dtype | None) -> list[Entry]:
    sizes = axis_sizes(source.spec, layout.padded_vocab)
    return [
        _entry(source, parameter, Cut(parameter.row, sizes, layout.tp), topology.tp_rank, dtype)
        for parameter in parameters(rows_of(source.spec.family), source.spec, topology, layout.layers)
    ]


def _entry(source: Source, parameter: Parameter, cut: Cut, rank: int, dtype: torch.dtype | None) -> Entry:
    kept = dtype or source.dtype(parameter.row, parameter.layer)
    return Entry(parameter.name, kept, cut.shape, partial(_make, source, parameter, cut, rank, kept))


def _make(source: Source, parameter: Parameter, cut: Cut, rank: int, dtype: torch.dtype) -> Tensor:
    tensor = cut.write(reader(source, parameter.row, parameter.layer), rank)
    return converted(tensor, dtype, parameter.name)
