"""The output of `predict`: one JSON line for each input, in order, on disk as soon as it can be."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from errno import EACCES, ENOENT
from pathlib import Path
from typing import Any

from mindgen.commands.predict.options import PredictConfig

_SECONDS_UNSYNCED = 5.0  # the most that a loss of power may take; the end of a process takes nothing
Version = tuple[int, int]  # size and time of the last change, which tell whether somebody has written since


def check_output_file(options: PredictConfig) -> None:
    """Refuses a file that could not be written, or whose lines would be lost. ValueError says what to do.

    Nothing is created or changed.
    """
    path = Path(options.output_file)
    try:
        _check_writable(path)
    except OSError as error:
        raise ValueError(f"--output_file {path} cannot be written: {error.strerror}") from None
    if not path.exists():
        return
    if options.data_file is not None and path.samefile(options.data_file):
        raise ValueError(f"--data_file and --output_file are both {path}; write to another file")
    if not path.is_file() and (options.resume or options.overwrite):
        raise ValueError(f"--output_file {path} is not a regular file; --resume and --overwrite need one")
    if path.is_file() and path.stat().st_size and not (options.resume or options.overwrite):
        raise ValueError(
            f"--output_file {path} holds something already; continue it with --resume, begin it anew with --overwrite, "
            "or name another file"
        )


def _check_writable(path: Path) -> None:
    if path.exists():
        with path.open("ab"):
            return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(ENOENT, os.strerror(ENOENT))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(EACCES, os.strerror(EACCES))


def version_of(options: PredictConfig) -> Version:
    """The output file's, to compare with later; a file that is not there is the same as an empty one."""
    path = Path(options.output_file)
    if not path.is_file() or not (found := path.stat()).st_size:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def finished_records(options: PredictConfig) -> Iterator[dict[str, Any]]:
    """The complete lines of a run that this one is to continue. ValueError for lines that are not ours."""
    path = Path(options.output_file)
    if not options.resume or not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _record(line, f"line {number} of --output_file {path}")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not {"src", "tgt", "output"} <= set(value):
        raise ValueError(f"{where} was not written by predict; name another file, or begin it anew with --overwrite")
    return value


class OutputFile:
    """The file while it is written: whole lines only, and one writer. Raises ValueError where the disk fails.

    checked: the version whose lines were counted; ValueError if the file has another one by now, unless it begins anew.
    """

    def __init__(self, options: PredictConfig, checked: Version | None = None) -> None:
        self._name = options.output_file
        self._file = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._synced = time.monotonic()
        try:
            self._lock()
            if not options.overwrite and checked not in (None, version_of(options)):
                raise ValueError(
                    f"--output_file {self._name} has changed since it was checked: another run has written to it; "
                    "nothing is added to it now, and --resume goes on behind it"
                )
            if Path(self._name).is_file():
                os.ftruncate(self._file, 0 if options.overwrite else _end_of_lines(self._file))
        except BaseException:
            os.close(self._file)
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line; it outlives the process from here on."""
        left = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            while left:
                left = left[os.write(self._file, left) :]
            self._sync(_SECONDS_UNSYNCED)
        except OSError as error:
            raise ValueError(
                f"--output_file {self._name} cannot be written: {error.strerror}; its complete lines stay, and "
                "--resume goes on behind them"
            ) from None

    def close(self) -> None:
        try:
            self._sync(0.0)
        finally:
            os.close(self._file)

    def _sync(self, after: float) -> None:
        if time.monotonic() - self._synced >= after and Path(self._name).is_file():
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output_file {self._name} is being written by another run; wait for its end") from None
        except OSError:
            pass  # a file system without locks


def _end_of_lines(file: int) -> int:
    """The size of a file without the half line at its end."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - (1 << 16))
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
