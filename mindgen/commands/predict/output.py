"""The output of `predict`: one JSON line for each input, in order, on disk as soon as it can be."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mindgen.commands.files import check_apart, check_writable
from mindgen.commands.predict.journal import journal_path, unfinished
from mindgen.commands.predict.options import PredictConfig
from mindgen.commands.predict.records import Record, append_record, read_records

_SECONDS_UNSYNCED = 5.0  # the most that a loss of power may take; the end of a process takes nothing
_OTHER_FILE = "name another file, or begin it anew with --overwrite"
Version = tuple[int, ...]  # sizes and times of the last change, which tell whether somebody has written since
NOTHING: Version = (0,) * 6  # the version of files that are not there


def check_output_file(options: PredictConfig) -> None:
    """Refuses a file that could not be written, or whose lines would be lost. ValueError says what to do.

    Nothing is created or changed.
    """
    check_writable("--output_file", options.output_file)
    path = Path(options.output_file)
    check_apart("--output_file", options.output_file, {"--data_file": options.data_file})
    if path.exists() and not path.is_file() and (options.resume or options.overwrite):
        raise ValueError(f"--output_file {path} is not a regular file; --resume and --overwrite need one")
    _check_kept(path, f"--output_file {path}", options)
    if (journal := journal_path(options.output_file)) is not None:
        _check_journal(journal, options)
        _check_journal(unfinished(journal), options)


def _check_journal(path: Path, options: PredictConfig) -> None:
    check_apart("the journal of --output_file", str(path), {"--data_file": options.data_file})
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{path}, where answers wait beside --output_file, is no regular file; move it away, or name another "
            "--output_file"
        )
    _check_kept(path, f"{path}, beside --output_file,", options)


def _check_kept(path: Path, title: str, options: PredictConfig) -> None:
    if path.is_file() and path.stat().st_size and not (options.resume or options.overwrite):
        raise ValueError(
            f"{title} holds something already; continue it with --resume, begin it anew with --overwrite, or name "
            "another file"
        )


def version_of(options: PredictConfig) -> Version:
    """The output file's and its journal's, to compare with later; one that is not there is the same as an empty one."""
    journal = journal_path(options.output_file)
    beside = (None, None) if journal is None else (journal, unfinished(journal))
    return tuple(part for path in (Path(options.output_file), *beside) for part in _state(path))


def _state(path: Path | None) -> tuple[int, int]:
    if path is None or not path.is_file() or not (found := path.stat()).st_size:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def finished_records(options: PredictConfig) -> Iterator[Record]:
    """The complete lines of a run that this one is to continue. ValueError for lines that are not ours."""
    if options.resume:
        yield from read_records(Path(options.output_file), f"--output_file {options.output_file}", _OTHER_FILE)


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
            if options.overwrite and (journal := journal_path(self._name)) is not None:
                journal.unlink(missing_ok=True)  # first, for it belongs to what the output holds
            if Path(self._name).is_file():
                os.ftruncate(self._file, 0 if options.overwrite else _end_of_lines(self._file))
        except BaseException:
            os.close(self._file)
            raise

    def write(self, record: Record) -> None:
        """Appends a line; it outlives the process from here on."""
        try:
            append_record(self._file, record)
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
