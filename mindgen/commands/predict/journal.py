"""Answers of `predict` that ended before an earlier one did: on disk beside the output until their turn comes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mindgen.commands.predict.records import Record, append_record, read_records

_SPENT = 1000  # lines whose turn has come that may stand in the file before it is written anew


def journal_path(output_file: str) -> Path | None:
    """Where it is; None beside an output that is no regular file, or in a folder that takes no new one."""
    path = Path(output_file).resolve()
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK | os.X_OK):
        return None
    return path.with_name(f"{path.name}.journal")


def read_journal(output_file: str) -> dict[int, Record]:
    """The records in it by the numbers of their input lines. ValueError for lines that are not ours."""
    path = journal_path(output_file)
    found = {} if path is None else {_number(record): record for record in read_records(path, str(path))}
    if None in found:
        raise ValueError(f"{path} was not written by predict; move it away, or begin anew with --overwrite")
    return {number: record for number, record in found.items() if number is not None}


def _number(record: Record) -> int | None:
    number = record.pop("line", None)
    return number if type(number) is int else None


class Journal:
    """The file while it is written, by whoever has the lock of the output file. It is made when it is needed first.

    path: None for none. waiting: what an interrupted run left, of lines whose turn is still to come.
    Raises ValueError where the disk fails.
    """

    def __init__(self, path: Path | None, waiting: Mapping[int, Record]) -> None:
        self._path = path
        self._waiting = dict(waiting)
        self._file: int | None = None
        self._num_lines = 0
        if waiting:
            self._begin()

    def add(self, number: int, record: Record) -> None:
        """The answer to an input line, which waits for that to an earlier one."""
        self._waiting[number] = record
        if self._file is None:
            self._begin()
        else:
            with _named(self._path):
                append_record(self._file, record | {"line": number})
            self._num_lines += 1

    def drop(self, number: int) -> None:
        """That line is in the output now."""
        if self._waiting.pop(number, None) is not None and self._num_lines > 2 * len(self._waiting) + _SPENT:
            self._begin()

    def close(self) -> None:
        """Takes the file away, unless it holds an answer that the output does not."""
        self._end()
        if self._path is not None and not self._waiting:
            for path in (self._path, _unfinished(self._path)):
                path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Puts a file of what waits in the place of the one before, whole or not at all."""
        if self._path is None:
            return
        beside = _unfinished(self._path)
        with _named(self._path):
            file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
            try:
                for number, record in self._waiting.items():
                    append_record(file, record | {"line": number})
                beside.replace(self._path)
            except BaseException:
                os.close(file)
                raise
        self._end()
        self._file, self._num_lines = file, len(self._waiting)

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; what stands in it and in the output stays, and --resume goes "
            "on behind it"
        ) from None
