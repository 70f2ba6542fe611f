"""Files of weights, written tensor by tensor, each byte counted and checksummed on its way."""

from __future__ import annotations

import argparse
import gc
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindgen.spec import ModelSpec
from mindgen.weights.manifest import FileRecord, Layout, TensorRecord

Advance = Callable[[int], Any]  # is told of bytes written
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_CHUNK = 1 << 24  # bytes written at a time


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, what it is, and how to make it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def made(self) -> Tensor:
        """The tensor in memory of its own, in order."""
        tensor = self.make()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), f"{self.name}: {tensor.shape}"
        return tensor.contiguous()


@dataclass(frozen=True)
class Plan:
    """What a conversion writes: `size` bytes of tensors, of a model with `spec`, in a `layout` (None: Hugging Face).

    `write(folder, conversion, advance)` does it, and gives the record of every file by its name from `folder`.
    """

    spec: ModelSpec
    layout: Layout | None
    size: int
    write: Callable[[Path, str, Advance], dict[str, FileRecord]]


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in another dtype. ValueError, naming it, for a value that is too large for that."""
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not torch.equal(result.isinf(), tensor.isinf()):
        raise ValueError(f"{name} has values beyond {torch.finfo(dtype).max:.0f}, which fp16 cannot hold; use bf16")
    return result


class OutputFile:
    """A new file that counts and checksums what it is given.

    `write` never raises: torch's writer, which calls it from C++, would not survive that. The first failure is kept,
    what follows is dropped, and `close` raises it, naming the file.
    """

    def __init__(self, path: Path, advance: Advance):
        self.path = path
        self.size = self.crc32 = 0
        self._advance = advance
        self._failure: BaseException | None = None
        self._file = path.open("xb", buffering=0)

    def write(self, data: Any) -> int:
        """Takes any bytes; returns their number."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            if self._failure is None:
                self._write_chunk(view[start : start + _CHUNK])
        return len(view)

    def _write_chunk(self, chunk: memoryview) -> None:
        try:
            done = 0
            while done < len(chunk):
                done += self._file.write(chunk[done:])
            self.crc32 = zlib.crc32(chunk, self.crc32)
            self.size += len(chunk)
            self._advance(len(chunk))
        except BaseException as error:
            self._failure = error

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Makes the file durable. Raises what went wrong while it was written."""
        try:
            if self._failure is None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._failure = error
        self._file.close()
        if isinstance(self._failure, OSError):
            raise OSError(self._failure.errno, self._failure.strerror, str(self.path)) from None
        if self._failure is not None:
            raise self._failure

    def record(self, tensors: dict[str, TensorRecord] | None = None) -> FileRecord:
        """What was written."""
        return FileRecord(self.size, self.crc32, tensors or {})


def write_safetensors(path: Path, entries: list[Entry], metadata: dict[str, str], advance: Advance) -> FileRecord:
    """Writes a safetensors file, holding one tensor at a time. OSError names the file."""
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # so that every tensor begins aligned
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.name] = {
            "dtype": _SAFETENSORS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, advance, lambda file: _write_tensors(file, len(text).to_bytes(8, "little") + text, entries))


def _write_tensors(file: OutputFile, header: bytes, entries: list[Entry]) -> dict[str, TensorRecord]:
    file.write(header)
    records = {}
    for entry in entries:
        tensor = entry.made()
        records[entry.name] = _record(tensor)
        file.write(_bytes(tensor))
    return records


def write_torch(path: Path, entries: list[Entry], args: dict[str, Any], iteration: int, advance: Advance) -> FileRecord:
    """Writes a shard as Megatron does, holding all of it. OSError names the file."""

    def write(file: OutputFile) -> dict[str, TensorRecord]:
        model = {entry.name: _own(entry.made()) for entry in entries}
        shard = {
            "args": argparse.Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": model,
        }
        torch.save(shard, file)  # type: ignore[arg-type]
        gc.collect(1)  # older versions of torch leave a cycle behind that keeps all they saved; all is young
        return {name: _record(tensor) for name, tensor in model.items()}

    return _write(path, advance, write)


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Writes a small file. OSError names it."""

    def write(file: OutputFile) -> dict[str, TensorRecord]:
        file.write(data)
        return {}

    return _write(path, lambda _: None, write)


def _write(path: Path, advance: Advance, write: Callable[[OutputFile], dict[str, TensorRecord]]) -> FileRecord:
    file = OutputFile(path, advance)
    try:
        records = write(file)
    finally:
        file.close()
    return file.record(records)


def _own(tensor: Tensor) -> Tensor:
    """The tensor with a storage that holds nothing else: torch.save writes whole storages."""
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _record(tensor: Tensor) -> TensorRecord:
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorRecord(name, tuple(tensor.shape), zlib.crc32(_bytes(tensor)))
