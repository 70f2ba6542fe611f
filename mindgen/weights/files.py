"""Files of a checkpoint: opened only where they belong, and only if they are files."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

WEIGHTS = (".safetensors", ".pt", ".bin")


def regular_file(folder: Path, name: str) -> Path:
    """The path of a regular file that `folder` names and that really lies inside it.

    Raises ValueError for a name or a link that leads elsewhere, and for directories, pipes and devices.
    """
    path = folder / name
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names a file {name[:200]!r}; a checkpoint's files must lie inside its own folder")
    try:
        mode = path.stat().st_mode
        inside = path.resolve().is_relative_to(folder.resolve())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{folder} names a file that cannot be opened: {error.strerror}") from None
    if not inside:
        raise ValueError(f"{path} is a link that leads out of {folder}; a checkpoint's files must lie inside it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file")
    return path


def open_regular(folder: Path, name: str) -> BinaryIO:
    """A regular file of `folder`, opened for reading bytes."""
    path = regular_file(folder, name)
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def sync_directory(path: Path) -> None:
    """Makes the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
