"""Writing a Hugging Face folder: the whole model in files of a bounded size, with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mindgen.parallel.topology import SINGLE
from mindgen.weights.families import rows_of
from mindgen.weights.manifest import FileRecord
from mindgen.weights.rows import Parameter, axis_sizes, parameters
from mindgen.weights.source import Source
from mindgen.weights.writers import Advance, Entry, Plan, converted, write_bytes, write_safetensors

FILE_SIZE = 4 << 30  # bytes of tensors in one file


def plan_huggingface(source: Source, dtype: torch.dtype | None, file_size: int = FILE_SIZE) -> Plan:
    """What to write as a Hugging Face folder. `dtype` None keeps what is stored, tensor by tensor."""
    spec = source.spec if dtype is None else replace(source.spec, dtype=str(dtype).removeprefix("torch."))
    files = list(_divide(_entries(source, dtype), file_size))
    size = sum(entry.size for entries in files for entry in entries)

    def write(folder: Path, conversion: str, advance: Advance) -> dict[str, FileRecord]:
        names = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
        if len(files) == 1:
            return {"model.safetensors": _write(folder / "model.safetensors", files[0], advance)}
        records = {name: _write(folder / name, entries, advance) for name, entries in zip(names, files, strict=True)}
        index = {
            "metadata": {"total_size": size},
            "weight_map": {tensor: name for name, record in records.items() for tensor in record.tensors},
        }
        data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        return records | {"model.safetensors.index.json": write_bytes(folder / "model.safetensors.index.json", data)}

    return Plan(spec, None, size, write)


def _write(path: Path, entries: list[Entry], advance: Advance) -> FileRecord:
    return write_safetensors(path, entries, {"format": "pt"}, advance)


def _divide(entries: Iterator[Entry], file_size: int) -> Iterator[list[Entry]]:
    """Runs of entries that fit into a file; a tensor that is larger than that has a file of its own."""
    run: list[Entry] = []
    for entry in entries:
        if run and sum(other.size for other in run) + entry.size > file_size:
            yield run
            run = []
        run.append(entry)
    yield run


def _entries(source: Source, dtype: torch.dtype | None) -> Iterator[Entry]:
    sizes = axis_sizes(source.spec)
    last = _LastRow(source)
    for parameter in parameters(rows_of(source.spec.family), source.spec, SINGLE):
        kept = dtype or source.dtype(parameter.row, parameter.layer)
        for name, shape in parameter.row.tensors(sizes).items():
            yield Entry(name.format(layer=parameter.layer), kept, shape, partial(last.take, parameter, name, kept))


class _LastRow:
    """Reads a row once for all the tensors that are unpacked from it, and holds no other."""

    def __init__(self, source: Source):
        self._source = source
        self._held: Parameter | None = None
        self._tensors: dict[str, Tensor] = {}

    def take(self, parameter: Parameter, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor of a row, which can be taken once."""
        if self._held != parameter:
            self._tensors = {}
            sizes, row = axis_sizes(self._source.spec), parameter.row
            whole = self._source.read(row, parameter.layer, 0, sizes[row.split] if row.split else 1)
            self._held, self._tensors = parameter, row.unpack(whole, sizes)
        return converted(self._tensors.pop(name), dtype, name.format(layer=parameter.layer))
