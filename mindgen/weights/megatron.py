"""Megatron directories of any TP x PP as a Source: every rank reads only the slices that it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindgen.parallel.topology import Topology
from mindgen.spec import DTYPES, ModelSpec
from mindgen.weights.chunks import Cut
from mindgen.weights.families import find_family, rows_of
from mindgen.weights.flags import Statement, stated_by_args, stated_by_spec
from mindgen.weights.huggingface import read_json, spec_from_config
from mindgen.weights.manifest import Manifest, read_manifest
from mindgen.weights.megatron_directory import Grid, find_grid, find_iteration
from mindgen.weights.megatron_spec import check_family, family_of, merge, spec_from_statement
from mindgen.weights.rows import EMBEDDING, HEAD, Row, axis_sizes, parameters
from mindgen.weights.shards import Shard, open_shard

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def open_megatron(
    path: Path, flags: dict[str, Any] | None = None, tokenizer_path: Path | None = None
) -> MegatronSource:
    """Opens a checkpoint or one of its iterations.

    flags: given architecture flags (see flags.py), which fill in what the checkpoint does not state.
    tokenizer_path: a folder whose `config.json` counts where the checkpoint has none.
    Raises ValueError naming the file for what is missing, damaged, contradictory or not implemented.
    """
    return MegatronSource(path, flags or {}, tokenizer_path)


def shard_identity(conversion: str, stage: int, rank: int) -> str:
    """What our shards say of themselves, so that one in a wrong place is noticed."""
    return f"{conversion} pp {stage} tp {rank}"


class MegatronSource:
    """A Source (see source.py) over the shards of one iteration.

    grid: where the shards lie. layers: how many each stage has. manifest: what mindgen wrote, None for others' folders.
    config: the `config.json` that counts, None without one.
    """

    def __init__(self, path: Path, flags: dict[str, Any], tokenizer_path: Path | None):
        self.path = path
        self.folder = find_iteration(path)
        self.grid: Grid = find_grid(self.folder)
        self.manifest: Manifest | None = read_manifest(self.folder)
        self._shards: dict[tuple[int, int], Shard] = {}
        self._check_manifest()
        self.config = _find_config(self.folder, path, tokenizer_path)
        self.layers = tuple(self._count_layers(stage) for stage in range(self.grid.pp))
        self.spec: ModelSpec = self.manifest.spec if self.manifest else self._find_spec(flags)
        self._check_layers()
        rows, _ = self._shard(0, 0).describe(EMBEDDING)[0]
        self.padded_vocab = rows * self.grid.tp
        if self.padded_vocab < self.spec.vocab_size:
            raise ValueError(
                f"{self.folder} holds {self.padded_vocab} rows of vocabulary; the model has {self.spec.vocab_size}"
            )
        self._sizes = axis_sizes(self.spec, self.padded_vocab)
        self._rows = {row.name: row for row in rows_of(self.spec.family)}

    def read(self, row: Row, layer: int | None, start: int, stop: int) -> Tensor:
        """The logical array of `row` between two bounds of its split axis."""
        row, stage, name = self._place(row, layer)
        cut = Cut(row, self._sizes, self.grid.tp)

        def read_chunk(rank: int, dim: int, begin: int, end: int) -> Tensor:
            shard = self._shard(stage, rank)
            shape, _ = shard.describe(name)
            if shape != cut.shape:
                raise ValueError(f"{shard.path}: {name} is {list(shape)}, expected {list(cut.shape)}")
            return shard.slice(name, dim, begin, end)

        return cut.read(read_chunk, start, stop)

    def dtype(self, row: Row, layer: int | None) -> torch.dtype:
        """How a row is stored."""
        row, stage, name = self._place(row, layer)
        found: torch.dtype = getattr(torch, self._shard(stage, 0).describe(name)[1])
        return found

    def check(self) -> None:
        """Every shard holds what its place asks for and nothing else; one ValueError lists what is not so."""
        problems: list[str] = []
        for stage, rank in self._places():
            problems += self._misfits(stage, rank)
        if problems:
            shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise ValueError(f"{self.folder} does not hold the {self.spec.family} model that it should:\n  {shown}")

    def check_tied_head(self) -> None:
        """ValueError if the last stage has a head of its own although the model is said to share the embedding."""
        for rank in range(self.grid.tp if self.spec.tie_embeddings else 0):
            first, last = self._shard(0, rank), self._shard(self.grid.pp - 1, rank)
            if HEAD in last.names and not torch.equal(_whole(first, EMBEDDING), _whole(last, HEAD)):
                raise ValueError(
                    f"{last.path}: {HEAD} is not a copy of {EMBEDDING}, but the model is said to share them; give "
                    "--untie-embeddings-and-output-weights, or correct tie_word_embeddings in its config.json"
                )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(path for stage in self.grid.files for path in stage)

    @property
    def text_folders(self) -> tuple[Path, ...]:
        """Where tokenizer and generation settings may lie, in this order."""
        return (self.folder, self.path)

    def close(self) -> None:
        """Lets go of the mapped files."""
        self._shards.clear()

    def _places(self) -> Iterator[tuple[int, int]]:
        return ((stage, rank) for stage in range(self.grid.pp) for rank in range(self.grid.tp))

    def _shard(self, stage: int, rank: int) -> Shard:
        if (stage, rank) not in self._shards:
            shard = open_shard(self.grid.files[stage][rank])
            self._check_shard(shard, stage, rank)
            self._shards[stage, rank] = shard
        return self._shards[stage, rank]

    def _check_shard(self, shard: Shard, stage: int, rank: int) -> None:
        """That a shard belongs to this checkpoint and to this place in it, as far as it says."""
        expected = shard_identity(self.manifest.conversion, stage, rank) if self.manifest else shard.identity
        if shard.identity != expected:
            raise ValueError(f"{shard.path} says that it is {shard.identity}, not {expected}: it comes from elsewhere")
        first = self._shards.get((0, 0), shard)
        if shard.iteration != first.iteration:
            raise ValueError(f"{shard.path} is of iteration {shard.iteration}, {first.path} of {first.iteration}")
        sizes = {"tensor": self.grid.tp, "pipeline": self.grid.pp, "expert": 1}
        for kind, size in sizes.items():
            stated = shard.args.get(f"{kind}_model_parallel_size")
            if stated not in (None, size):
                raise ValueError(
                    f"{shard.path} is of a checkpoint with {kind} parallel size {stated}; its folder holds {size}"
                )

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        layout = self.manifest.layout
        found = (self.grid.tp, self.grid.pp, self.grid.save_format)
        if layout is None or (layout.tp, layout.pp, layout.save_format) != found:
            raise ValueError(f"{self.folder} holds shards of (tp, pp, format) {found}; its manifest says {layout}")
        self.manifest.check_sizes(self.folder)

    def _count_layers(self, stage: int) -> int:
        shard = self._shard(stage, 0)
        found = {int(match[1]) for match in map(_LAYER.match, shard.names) if match}
        if found != set(range(len(found))):
            gaps = sorted(set(range(max(found))) - found)[:8]
            raise ValueError(f"{shard.path} lacks layers {gaps} between others; mindgen reads no empty (noop) layers")
        return len(found)

    def _check_layers(self) -> None:
        counts = ",".join(map(str, self.layers))
        if sum(self.layers) != self.spec.num_layers or 0 in self.layers:
            raise ValueError(f"{self.folder} holds {counts} layers by stage; the model has {self.spec.num_layers}")
        layout = self.manifest.layout if self.manifest else None
        if layout is not None and layout.layers != self.layers:
            raise ValueError(f"{self.folder} holds {counts} layers by stage; its manifest says {layout.layers}")

    def _find_spec(self, flags: dict[str, Any]) -> ModelSpec:
        first = self._shard(0, 0)
        found: dict[str, Statement] = {}
        try:
            weights = family_of(first.names)
            if first.args:
                found[f"args of {first.path}"] = stated_by_args(first.args)
        except ValueError as error:
            raise ValueError(f"{first.path}: {error}") from None
        dtype, family = first.describe(EMBEDDING)[1], weights
        if self.config is not None:
            spec = spec_from_config(read_json(self.config), dtype, str(self.config))
            check_family(spec.family, weights, str(self.config))
            found[str(self.config)], family = stated_by_spec(spec), spec.family
        has = find_family(weights)
        found["the weights"] = {"qkv_bias": has.qkv_bias, "qk_norm": has.qk_norm}
        return spec_from_statement(merge(found, flags), family, dtype, str(self.folder))

    def _place(self, row: Row, layer: int | None) -> tuple[Row, int, str]:
        """Which row is read for a row, its stage, and its name there; a tied head is read as the embedding."""
        if row.name == HEAD and self.spec.tie_embeddings:
            row = self._rows[EMBEDDING]
        if layer is None:
            return row, 0 if row.stage == "first" else self.grid.pp - 1, row.name
        stage = 0
        while layer >= self.layers[stage]:
            layer -= self.layers[stage]
            stage += 1
        return row, stage, row.name.format(layer=layer)

    def _misfits(self, stage: int, rank: int) -> list[str]:
        shard = self._shard(stage, rank)
        topology = Topology(stage * self.grid.tp + rank, self.grid.tp, self.grid.pp)
        rows = tuple(self._rows.values())
        expected = {
            parameter.name: Cut(parameter.row, self._sizes, self.grid.tp).shape
            for parameter in parameters(rows, self.spec, topology, self.layers)
        }
        where = shard.path.relative_to(self.folder)
        optional = {HEAD} if self.spec.tie_embeddings and topology.is_last_stage else set()
        problems = [f"{where}: missing: {name}" for name in expected if name not in shard.names]
        problems += [f"{where}: left over: {name}" for name in shard.names if name not in expected.keys() | optional]
        for name in expected.keys() & shard.names.keys():
            shape, dtype = shard.describe(name)
            if shape != expected[name]:
                problems.append(f"{where}: wrong shape: {name} is {list(shape)}, expected {list(expected[name])}")
            if dtype not in DTYPES:
                problems.append(f"{where}: wrong dtype: {name} is {dtype}; supported are {', '.join(DTYPES)}")
        return problems


def _whole(shard: Shard, name: str) -> Tensor:
    return shard.slice(name, 0, 0, shard.describe(name)[0][0])


def _find_config(*folders: Path | None) -> Path | None:
    for folder in folders:
        if folder is not None and (folder / "config.json").is_file():
            return folder / "config.json"
    return None
