"""Writing a Megatron directory: one file for each tensor rank of each stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from mindgen.parallel.topology import Topology, split_layers
from mindgen.weights.chunks import Cut
from mindgen.weights.expert_layout import grouped, grouped_name, grouped_shape
from mindgen.weights.families import rows_of
from mindgen.weights.manifest import FileRecord, Layout
from mindgen.weights.megatron import shard_identity
from mindgen.weights.megatron_directory import NAMES, Place, shard_name
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
    ep: int,
    layer_list: tuple[int, ...] | None,
    divisor: int,
    save_format: str,
    dtype: torch.dtype | None,
    groups_experts: bool = False,
) -> Plan:
    """What to write for `tp` x `pp` ranks, of which those of a stage share out experts in `ep` groups.

    `dtype` None keeps what is stored, tensor by tensor. `groups_experts` puts a layer's experts into two tensors.

    The vocabulary is padded to a multiple of `divisor * tp`. Raises ValueError if the model does not divide.
    """
    spec = source.spec if dtype is None else replace(source.spec, dtype=str(dtype).removeprefix("torch."))
    check_divides(spec, tp, ep)
    layers = tuple(len(stage) for stage in split_layers(spec.num_layers, pp, layer_list))
    layout = Layout(tp, pp, layers, padded_vocab(spec.vocab_size, tp, divisor), save_format, ep, groups_experts)
    shards = {
        (stage, rank): _entries(source, layout, Topology(stage * tp + rank, tp, pp, ep), dtype)
        for stage in range(pp)
        for rank in range(tp)
    }

    def write(folder: Path, conversion: str, advance: Advance) -> dict[str, FileRecord]:
        files = {}
        for (stage, rank), entries in shards.items():
            place = Place(stage, rank, Topology(rank, tp, ep=ep).ep_rank)
            name = f"{shard_name(place, pp, ep)}/{NAMES[save_format]}"
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
    entries: dict[str, list[Entry]] = {}
    for parameter in parameters(rows_of(source.spec.family), source.spec, topology, layout.layers):
        name = grouped_name(parameter.name) if layout.groups_experts else parameter.name
        entries.setdefault(name, []).append(_entry(source, parameter, sizes, topology, dtype))
    return [found[0] if found[0].name == name else _grouped(name, found) for name, found in entries.items()]


def _grouped(name: str, entries: list[Entry]) -> Entry:
    dtype = reduce(torch.promote_types, (entry.dtype for entry in entries))
    shape = grouped_shape(name, entries[0].shape, len(entries))
    return Entry(name, dtype, shape, lambda: grouped([entry.make().to(dtype) for entry in entries], shape))


def _entry(
    source: Source, parameter: Parameter, sizes: dict[str, int], topology: Topology, dtype: torch.dtype | None
) -> Entry:
    rank, ranks = parameter.row.share(topology)
    cut = Cut(parameter.row, sizes, ranks)
    kept = dtype or source.dtype(parameter.row, parameter.layer)
    return Entry(parameter.name, kept, cut.shape, partial(_make, source, parameter, cut, rank, kept))


def _make(source: Source, parameter: Parameter, cut: Cut, rank: int, dtype: torch.dtype) -> Tensor:
    tensor = cut.write(reader(source, parameter.row, parameter.layer), rank)
    return converted(tensor, dtype, parameter.name)
