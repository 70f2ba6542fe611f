"""Files that a command is to write, looked at before anything is computed. Nothing is created or changed."""

from __future__ import annotations

import os
from errno import EACCES, ENOENT
from pathlib import Path


def check_writable(flag: str, name: str) -> None:
    """Refuses a file that could not be written. ValueError names it and its flag."""
    try:
        _try(Path(name))
    except OSError as error:
        raise ValueError(f"{flag} {name} cannot be written: {error.strerror}") from None


def check_apart(flag: str, name: str, others: dict[str, str | None]) -> None:
    """Refuses a file that one of the `others`, by their flags, is too, however it is spelled. ValueError names both."""
    for other, known in others.items():
        if known is not None and _same(Path(name), Path(known)):
            raise ValueError(f"{other} and {flag} are both {name}; write to another file")


def _try(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError:
        _try_folder(path.resolve().parent)
    else:
        with path.open("ab"):
            pass


def _try_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(ENOENT, os.strerror(ENOENT))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(EACCES, os.strerror(EACCES))


def _same(one: Path, other: Path) -> bool:
    targets = [os.path.realpath(path) for path in (one, other)]  # which takes links that lead to themselves
    return targets[0] == targets[1] or (one.exists() and other.exists() and one.samefile(other))
