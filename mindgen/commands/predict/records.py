"""The lines that `predict` writes: JSON objects with `src`, `tgt` and `output`, and where one failed `error`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_KEYS = ("src", "tgt", "output")


def append_record(file: int, record: Record) -> None:
    """Adds a line to an open file; it outlives the process from here on."""
    left = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    while left:
        left = left[os.write(file, left) :]


def read_records(path: Path, title: str, remedy: str) -> Iterator[Record]:
    """The records of a file, without the half line that a crash may leave at its end; none if it is not there.

    Raises ValueError, which calls the file by its `title` and says the `remedy`, for a line that is none.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _record(line, f"line {number} of {title} was not written by predict; {remedy}")


def _record(line: bytes, refusal: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not set(_KEYS) <= set(value):
        raise ValueError(refusal)
    return value
