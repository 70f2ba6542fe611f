"""The manifest of what mindgen wrote: every file with its size and checksum, every tensor, and the model's spec.

It is JSON in one canonical form, so that no bit of it can change unseen: what is parsed must be written back the same.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindgen.spec import ModelSpec, RopeScaling
from mindgen.weights.files import open_regular

MANIFEST = "mindgen_manifest.json"
_FORMAT = 1
_LARGEST = 1 << 28  # bytes; that of a large model has some hundred thousand tensors


@dataclass(frozen=True)
class TensorRecord:
    """What one tensor of a file is, and the CRC32 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes, the CRC32 of all of it, and its tensors by name."""

    size: int
    crc32: int
    tensors: dict[str, TensorRecord]


@dataclass(frozen=True)
class Layout:
    """How a model lies in a Megatron directory: `layers` for each stage, `padded_vocab` rows over all tensor ranks.

    `save_format` is `torch` or `safetensors`. Of the `tp` ranks, `ep` groups of neighbours have different experts.
    groups_experts: a layer's experts lie in two tensors (see expert_layout.py).
    """

    tp: int
    pp: int
    layers: tuple[int, ...]
    padded_vocab: int
    save_format: str
    ep: int = 1
    groups_experts: bool = False


@dataclass(frozen=True)
class Manifest:
    """All that one conversion wrote. `layout` is None for a Hugging Face folder; files are named from its folder."""

    conversion: str
    spec: ModelSpec
    layout: Layout | None
    files: dict[str, FileRecord]

    def write(self) -> bytes:
        """The canonical form."""
        return _canonical({"format": _FORMAT} | asdict(self))

    def check_sizes(self, folder: Path) -> None:
        """ValueError if a file of weights is missing or has another size than was written."""
        for name, record in self.files.items():
            if not record.tensors:
                continue  # tokenizer and settings are the user's to edit
            with open_regular(folder, name) as file:
                size = file.seek(0, 2)
            if size != record.size:
                raise ValueError(f"{folder / name} has {size} bytes; its manifest says {record.size}. It is damaged")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none. ValueError for one that was changed."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    with open_regular(folder, MANIFEST) as file:
        data = file.read(_LARGEST)
    try:
        value = json.loads(data)
        if _canonical(value) != data:
            raise ValueError("its checksum does not match")
        if value["content"]["format"] != _FORMAT:
            raise ValueError(f"its format is {value['content']['format']}; this version of mindgen reads {_FORMAT}")
        return _manifest(value["content"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _canonical(value: dict[str, Any]) -> bytes:
    content = value.get("content", value)
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return json.dumps({"content": content, "crc32": zlib.crc32(text.encode())}, indent=1, sort_keys=True).encode()


def _manifest(content: dict[str, Any]) -> Manifest:
    files = {
        name: FileRecord(
            record["size"],
            record["crc32"],
            {
                tensor: TensorRecord(known["dtype"], tuple(known["shape"]), known["crc32"])
                for tensor, known in record["tensors"].items()
            },
        )
        for name, record in content["files"].items()
    }
    layout = content["layout"]
    if layout is not None:
        layout = Layout(**layout | {"layers": tuple(layout["layers"])})
    spec = content["spec"]
    for name in ("sliding_layers", "expert_layers"):
        if spec.get(name) is not None:
            spec = spec | {name: tuple(spec[name])}
    if spec["rope_scaling"] is not None:
        lists = {name: tuple(value) for name, value in spec["rope_scaling"].items() if isinstance(value, list)}
        spec = spec | {"rope_scaling": RopeScaling(**spec["rope_scaling"] | lists)}
    return Manifest(content["conversion"], ModelSpec(**spec), layout, files)
