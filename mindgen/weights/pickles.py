"""Megatron's `.pt` files, mapped into memory and read without running or importing anything that they name.

torch reads the usual ones itself (`weights_only=True`); newer_pickles.py reads those that MindSpeed-LLM's second
converter writes with pickle protocol 4, which torch's restricted reader does not know. Classes that a framework
pickled into `args` become inert stand-ins in both.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from mindgen.weights.newer_pickles import load_newer

# Classes of these packages may be named in a checkpoint; they are never imported.
_PACKAGES = re.compile(
    r"(megatron|mindspeed\w*|modellink\w*|transformer_engine\w*|apex|torch|torch_npu|argparse|enum|pathlib|signal|"
    r"datetime|types)(\.\w+)*\.[A-Z]\w*"
)
# What random number states, paths, enums and byte buffers are pickled as, besides classes.
_NAMES = re.compile(
    r"(builtins|__builtin__)\.(getattr|dict|list|set|int|float|str|bool|object)|_io\.BytesIO|copyreg\._reconstructor|"
    r"numpy(\._?core)?(\.multiarray|\.numeric)?\.(_reconstruct|_frombuffer|scalar|ndarray|dtype)|numpy\.dtypes\.\w+"
)
_DICTIONARIES = ("collections.defaultdict", "collections.OrderedDict", "collections.Counter")
_LARGEST_PICKLE = 1 << 28  # bytes; that of a real shard has some thousand names and numbers


class Inert:
    """Stands for an object whose class is not ours to import: it keeps what it was made from and does nothing."""

    def __init__(self, *arguments: Any, **named: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary that a `.pt` file holds, its tensors mapped into memory.

    Raises ValueError naming the file for anything that is not such a file, and naming the global for a pickle that
    asks for something that no checkpoint needs.
    """
    try:
        protocol = _check_archive(path)
        loaded = _load(path) if protocol <= 2 else load_newer(path, _stand_in)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged and cannot be read: {_reason(error)}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; a Megatron shard holds a dictionary")
    return loaded


def arguments_of(loaded: dict[str, Any]) -> dict[str, Any]:
    """The training arguments of a loaded shard by name, without those whose values are not plain; empty without any."""
    state = getattr(loaded.get("args"), "state", None)
    if not isinstance(state, dict):
        return {}
    return {name: value for name, value in state.items() if isinstance(name, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(item is None or isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _check_archive(path: Path) -> int:
    """The pickle protocol of a `.pt` file, after checking that it is an archive as torch writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise ValueError(f"{packed[0]!r} in it is compressed, which torch never does")
            pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
                raise ValueError("it is not an archive of torch.save: it has no one data.pkl of a sensible size")
            with archive.open(pickles[0]) as file:
                head = file.read(2)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(
            f"it is truncated or not a file of torch.save ({error}); files from before torch 1.6 must be saved again"
        ) from None
    return head[1] if head[:1] == b"\x80" and len(head) == 2 else 0


def _reason(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # what comes before it advises to trust the file
    return text.splitlines()[0] if text else type(error).__name__


def _load(path: Path) -> Any:
    with _no_safe_globals(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stand_ins: list[Any] = [(_stand_in(name), name) for name in get_unsafe_globals_in_checkpoint(str(path))]
        add_safe_globals(stand_ins)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def _no_safe_globals() -> Iterator[None]:
    """Forgets for a while what others, such as an imported Megatron, told torch to trust."""
    before = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _stand_in(name: str) -> Any:
    """What takes the place of a global: an inert class of its own. ValueError for what no checkpoint needs."""
    if name in _DICTIONARIES:
        return _plain_dictionary
    if not (_PACKAGES.fullmatch(name) or _NAMES.fullmatch(name)):
        raise ValueError(
            f"the pickle in it asks for {name}, which no checkpoint needs; mindgen runs no code from files. "
            "Do not load this file with anything else either, unless you know who made it"
        )
    return type(name.rpartition(".")[2], (Inert,), {})


def _plain_dictionary(*_: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()  # and not a dict: it may be given attributes
