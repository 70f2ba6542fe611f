"""`.pt` files of pickle protocols 3 to 5, read by an unpickler that can make nothing but plain values.

While the pickle is read no tensor exists, only descriptions of tensors; afterwards they are checked against the file
and become views of its mapped bytes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member, up to the lengths of its name and extra field


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Described:
    """A tensor as the pickle describes it; `offset`, `shape` and `stride` in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def load_newer(path: Path, stand_in: Callable[[str], Any]) -> Any:
    """What a `.pt` file holds. `stand_in` gives an inert callable for a global, or raises ValueError.

    Raises ValueError or UnpicklingError for files that are damaged or ask for more than plain values and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        name = next(entry.filename for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        data = archive.read(name)
        _check_memory(data)
        loaded = _Unpickler(data, stand_in).load()
        members = {entry.filename: entry for entry in archive.infolist()}
    size = path.stat().st_size
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    prefix = name.removesuffix("data.pkl") + "data/"
    return _with_tensors(loaded, lambda described: _materialise(described, members, prefix, mapped))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, stand_in: Callable[[str], Any]):
        super().__init__(io.BytesIO(data))
        self._stand_in = stand_in

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _STORAGES:
            return _STORAGES[full_name]
        if full_name.startswith("torch._utils._rebuild_tensor"):
            return _describe
        if full_name == "torch._utils._rebuild_parameter":
            return _described_parameter
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self._stand_in(full_name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, record = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(record, str):
            raise ValueError(f"the pickle in it refers to something other than tensor data: {str(pid)[:80]}")
        return _Storage(record, dtype)


def _describe(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Described:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a tensor in it has no proper shape")
    return _Described(storage, offset, tuple(shape), tuple(stride))


def _described_parameter(described: Any, *_: Any) -> Any:
    return described


def _with_tensors(value: Any, make: Callable[[_Described], Tensor], depth: int = 2) -> Any:
    """The same dictionary of dictionaries with tensors in the place of their descriptions."""
    if isinstance(value, _Described):
        return make(value)
    if isinstance(value, dict) and depth > 0:
        return {key: _with_tensors(item, make, depth - 1) for key, item in value.items()}
    return value


def _check_memory(data: bytes) -> None:
    """ValueError for a pickle that would make Python reserve more memory than its own length warrants."""
    for operation, argument, _ in pickletools.genops(data):
        puts = operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data)
        if puts or operation.name in ("BYTEARRAY8", "NEXT_BUFFER"):
            raise ValueError(f"the pickle in it does what no checkpoint needs ({operation.name})")


def _materialise(described: _Described, members: dict[str, zipfile.ZipInfo], prefix: str, mapped: Tensor) -> Tensor:
    member = members.get(prefix + described.storage.record)
    if member is None:
        raise ValueError(f"the data of a tensor is missing: {described.storage.record!r}")
    header = bytes(mapped[member.header_offset : member.header_offset + _LOCAL_HEADER.size].numpy())
    if len(header) < _LOCAL_HEADER.size:
        raise ValueError("the data of a tensor lies outside the file")
    start = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
    width = described.storage.dtype.itemsize
    if not _is_contiguous(described):
        raise ValueError(f"a tensor of shape {list(described.shape)} in it is not stored in order")
    begin = described.offset * width
    end = begin + prod(described.shape) * width
    if end > member.file_size or start + end > len(mapped) or start % width:
        raise ValueError(f"a tensor of shape {list(described.shape)} reaches beyond its data")
    return mapped[start + begin : start + end].view(described.storage.dtype).reshape(described.shape)


def _is_contiguous(described: _Described) -> bool:
    steps = [prod(described.shape[dim + 1 :]) for dim in range(len(described.shape))]
    of_any = zip(described.shape, described.stride, steps, strict=True)
    return 0 in described.shape or all(size == 1 or stride == step for size, stride, step in of_any)
