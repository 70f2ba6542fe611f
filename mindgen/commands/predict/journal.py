"""Answers of `predict` that ended before an earlier one did: on disk beside the output until their turn comes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mindgen.commands.predict.records import Record, append_record, read_records

_SPENT = 1000  # lines whose turn has come that may stand in the file before it is written anew
_AWAY = (
    "remove it or move it away, and only answers that had not had their turn are asked again; or begin all of the "
    "output anew with --overwrite"
)


def journal_path(output_file: str) -> Path | None:
    """Where it is; None beside an output that is no regular file, or in a folder that takes no new one."""
    if Path(output_file).exists() and not Path(output_file).is_file():
        return None  # asked before links are followed: that to a pipe leads to a name that nothing has
    path = Path(os.path.realpath(output_file))
    return path.with_name(f"{path.name}.journal") if os.access(path.parent, os.W_OK | os.X_OK) else None


def unfinished(journal: Path) -> Path:
    """Where a journal is written anew, to be put in the place of the one before."""
    return journal.with_name(f"{journal.name}.new")


def read_journal(output_file: str) -> dict[int, Record]:
    """The records in it by the numbers of their input lines. ValueError for lines that are not ours, also in what is
    left of one that was being written anew."""
    path = journal_path(output_file)
    if path is None:
        return {}
    _read(unfinished(path))
    return _read(path)


def _read(path: Path) -> dict[int, Record]:
    return {_number(record, path): record for record in read_records(path, str(path), _AWAY)}


def _number(record: Record, path: Path) -> int:
    number = record.pop("line", None)
    if type(number) is not int:
        raise ValueError(f"{path} was not written by predict; {_AWAY}")
    return number


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
        if path is not None:
            unfinished(path).unlink(missing_ok=True)  # of a run that was cut off: `check_output_file` saw to it
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
            self._path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Puts a file of what waits in the place of the one before, whole or not at all."""
        if self._path is None:
            return
        beside = unfinished(self._path)
        with _named(self._path):
            file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            try:
                for number, record in self._waiting.items():
                    append_record(file, record | {"line": number})
                beside.replace(self._path)
            except BaseException:
                os.close(file)
                beside.unlink(missing_ok=True)
                raise
        self._end()
        self._file, self._num_lines = file, len(self._waiting)

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; what stands in it and in the output stays, and --resume goes "
            "on behind it"
        ) from None
