"""Reading a checkpoint again in full, against the manifest of what was written."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindgen.weights.files import open_regular
from mindgen.weights.manifest import FileRecord, Manifest
from mindgen.weights.shards import open_shard

_CHUNK = 1 << 24  # bytes read at a time
_SHARDS = (".pt", ".safetensors")


def verify(folder: Path, manifest: Manifest, advance: Callable[[int], Any] = lambda _: None) -> None:
    """Reads every file that a manifest lists. One ValueError names all that differ, and which of their tensors.

    `advance` is told of bytes read.
    """
    problems = [
        problem for name, record in manifest.files.items() for problem in _problems(folder, name, record, advance)
    ]
    if problems:
        raise ValueError(f"{folder} is damaged:\n  " + "\n  ".join(problems))


def _problems(folder: Path, name: str, record: FileRecord, advance: Callable[[int], Any]) -> list[str]:
    try:
        size, crc32 = _read(folder, name, advance)
        if size != record.size:
            return [f"{name} has {size} bytes; {record.size} were written"]
        if crc32 != record.crc32:
            return [f"{name} has other bytes than were written{_where(folder, name, record)}"]
        return []
    except (ValueError, OSError) as error:
        return [f"{name}: {error}"]


def _read(folder: Path, name: str, advance: Callable[[int], Any]) -> tuple[int, int]:
    """Size and CRC32 of a file."""
    size = crc32 = 0
    with open_regular(folder, name) as file:
        while chunk := file.read(_CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
            size += len(chunk)
            advance(len(chunk))
    return size, crc32


def _where(folder: Path, name: str, record: FileRecord) -> str:
    """Which tensors differ, as words to end a sentence with."""
    if Path(name).suffix not in _SHARDS:
        return ""
    try:
        shard = open_shard(folder / name)
        known = record.tensors.items()
        names = [tensor for tensor, was in known if _crc32(shard, tensor, was.shape) != was.crc32]
    except (ValueError, TypeError, LookupError, RuntimeError):
        return ", and its tensors cannot be read"
    return f": {', '.join(names[:8])}" if names else ", outside its tensors"


def _crc32(shard: Any, name: str, shape: tuple[int, ...]) -> int:
    tensor = shard.slice(name, 0, 0, shape[0])
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
