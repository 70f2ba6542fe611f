"""Mapped tensors copied out of their files by several threads, in pieces of some megabytes.

What is not in the system's cache is read by several requests at once; past the cache (O_DIRECT) where `Pace` says so
and the file system can.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from mindgen.weights.ahead import threads
from mindgen.weights.mapped import Mappings, Stretch, is_cached, span
from mindgen.weights.pace import Pace

NUM_THREADS = 8  # requests that are under way at once
PIECE = 4 << 20  # bytes of a request, and of the memory that each thread reads into
_BLOCK = 4096  # what devices want offsets, lengths and memory to be multiples of
_DIRECT = getattr(os, "O_DIRECT", 0)


class Copier:
    """Copies tensors, reading those that are mapped from one of `files`. A context; leaving it ends its threads."""

    def __init__(self, files: tuple[Path, ...], pace: Pace):
        self._mappings = Mappings(files)
        self._threads = threads(NUM_THREADS, "weights-reader")
        self._readers: SimpleQueue[_Reader] = SimpleQueue()
        for _ in range(NUM_THREADS):
            self._readers.put(_Reader(pace))

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._readers.empty():
            self._readers.get().close()

    def is_cold(self, tensor: Tensor) -> bool:
        """Whether a tensor is mapped from one of the files, and mostly not in memory yet."""
        stretch = self._mappings.find(tensor)
        return stretch is not None and not is_cached(stretch)

    def copy(self, sources: list[Tensor], targets: list[Tensor]) -> None:
        """Fills each target with the source of its shape, converted to the target's dtype.

        Raises ValueError naming the file if it cannot be read or has become shorter, another error if the context is
        left meanwhile.
        """
        pieces = [piece for pair in zip(sources, targets, strict=True) for piece in self._pieces(*pair)]
        for _ in self._threads.map(self._copy, pieces):
            pass

    def _pieces(self, source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, Stretch | None]]:
        if not source.numel():
            return
        whole = self._mappings.find(source)
        for part, place in pieces(source, target):
            yield part, place, whole.part(part.data_ptr(), span(part)) if whole else None

    def _copy(self, piece: tuple[Tensor, Tensor, Stretch | None]) -> None:
        source, target, stretch = piece
        if stretch is None or is_cached(stretch) or not self._read(source, target, stretch):
            target.copy_(source)

    def _read(self, source: Tensor, target: Tensor, stretch: Stretch) -> bool:
        """Fills `target` from the file; False, and the system reads ahead, where the mapped memory serves better."""
        if 2 * source.nbytes < stretch.length:  # other ranks want the rest: read once, for all
            _read_ahead(stretch)
            return False
        reader = self._readers.get()
        try:
            memory = reader.read(stretch)
            if memory is None:
                _read_ahead(stretch)
                return False
            values = memory[: stretch.length // source.itemsize * source.itemsize].view(source.dtype)
            target.copy_(values.as_strided(source.shape, source.stride()))
            return True
        finally:
            self._readers.put(reader)


class _Reader:
    """Memory for one request, and the file of the last one, open."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._buffer = _buffer()
        self._memory = torch.frombuffer(self._buffer, dtype=torch.uint8)
        self._path: Path | None = None
        self._past_cache = False
        self._file: int | None = None

    def read(self, stretch: Stretch) -> Tensor | None:
        """Memory that holds a stretch until the next call; None if its file is another one now, or cannot be opened or
        read so."""
        first = stretch.offset // _BLOCK * _BLOCK
        end = stretch.offset + stretch.length
        try:
            self._open(stretch)
            done = self._fill(stretch, first, -(-(end - first) // _BLOCK) * _BLOCK)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise ValueError(f"{stretch.path} cannot be read: {error.strerror}") from None
            self.close()
            if self._past_cache:
                self._pace.give_up()
        if self._file is None:
            return None
        if first + done < end:
            raise ValueError(f"{stretch.path} ends at byte {first + done}, before its weights; it became shorter")
        return self._memory[stretch.offset - first : end - first]

    def _open(self, stretch: Stretch) -> None:
        if (stretch.path, self._pace.past_cache) != (self._path, self._past_cache):
            self.close()
            self._path, self._past_cache = stretch.path, self._pace.past_cache
            self._file = _open(stretch, self._past_cache)

    def _fill(self, stretch: Stretch, offset: int, length: int) -> int:
        """Reads into the memory; how many bytes."""
        if self._file is None:
            return 0
        memory = memoryview(self._buffer)[:length]
        if not self._past_cache:
            return _read_all(self._file, memory, offset)
        with self._pace.request(stretch) as to_follow:
            done = _read_all(self._file, memory, offset)
        for read in to_follow:
            _read_ahead(read)
        return done

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def _read_ahead(stretch: Stretch) -> None:
    """Asks the system to read a stretch into its cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), stretch.path.open("rb") as file:  # so many files are open that no more may be
        os.posix_fadvise(file.fileno(), stretch.offset, stretch.length, os.POSIX_FADV_WILLNEED)


def _open(stretch: Stretch, past_cache: bool) -> int | None:
    """None if what is mapped cannot be opened; OSError with EINVAL if the file system reads through its cache only."""
    try:
        file = os.open(stretch.path, os.O_RDONLY | (_DIRECT if past_cache else 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise
        return None  # it was deleted, or so many files are open that no more may be
    if os.fstat(file).st_ino == stretch.inode:
        return file
    os.close(file)  # another file has taken the place of the one that is mapped
    return None


def _read_all(file: int, buffer: memoryview, offset: int) -> int:
    """Reads until the buffer is full or the file ends; how many bytes that were."""
    done = 0
    while done < len(buffer):
        number = os.preadv(file, [buffer[done:]], offset + done)
        done += number
        if number % _BLOCK or not number:  # the end of the file
            break
    return done


def _buffer() -> mmap.mmap:
    buffer = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a request has a limited number of separate stretches of memory
        with suppress(OSError):  # a kernel without huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def pieces(source: Tensor, target: Tensor, limit: int = PIECE - 2 * _BLOCK) -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor and one of its shape in parts, from first to last in memory, that span at most `limit` bytes."""
    source, target = source.squeeze(), target.squeeze()
    order = sorted(range(source.dim()), key=source.stride, reverse=True)
    yield from _split(source.permute(order), target.permute(order), limit)


def _split(source: Tensor, target: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    if span(source) <= limit:
        yield source, target
        return
    entries = limit // (source.stride(0) * source.itemsize)
    if entries:
        yield from zip(source.split(entries), target.split(entries), strict=True)
        return
    for part, place in zip(source, target, strict=True):
        yield from _split(part, place, limit)
