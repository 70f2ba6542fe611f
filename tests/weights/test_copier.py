"""Mapped tensors come out of their files as they are, whether the system has the bytes in memory or not."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mindgen.weights import copier as copier_module
from mindgen.weights.copier import NUM_THREADS, PIECE, Copier, pieces
from mindgen.weights.mapped import Mappings, Stretch, is_cached, span
from mindgen.weights.pace import SAMPLE, Pace

SIZE = 4 * PIECE + 1234
ROWS, COLUMNS = 2900, 2200  # of two bytes: more than three pieces
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda numbers: numbers,
    "from an odd place": lambda numbers: numbers[77 : 77 + ROWS * 2000],
    "rows": lambda numbers: matrix(numbers)[13:-5],
    "most of each row": lambda numbers: matrix(numbers)[:, 7:1900],
    "little of each row": lambda numbers: matrix(numbers)[:, 100:400],
    "transposed": lambda numbers: matrix(numbers).t(),
    "repeated": lambda numbers: matrix(numbers)[-1:].expand(5, COLUMNS),
    "one number": lambda numbers: numbers[9],
    "none": lambda numbers: numbers[:0],
}


def matrix(numbers: Tensor) -> Tensor:
    return numbers[: ROWS * COLUMNS].view(ROWS, COLUMNS)


def drop_from_cache(*files: Path) -> None:
    """Has the system forget what it keeps of files, as far as it listens."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reads_past_the_cache(folder: Path) -> bool:
    """Whether this system can, and says what it keeps: else copies are right all the same, and fill its cache."""
    path = folder / "probe"
    path.write_bytes(bytes(4096))
    drop_from_cache(path)
    mapped = torch.from_file(str(path), shared=False, size=4096, dtype=torch.uint8)
    stretch = Mappings((path,)).find(mapped)
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(file, [mmap.mmap(-1, 4096)], 0)
        os.close(file)
    except (AttributeError, OSError):
        return False
    return stretch is not None and not is_cached(stretch)


def write_numbers(path: Path) -> Tensor:
    numbers = torch.randint(-30_000, 30_000, (SIZE // 2,), dtype=torch.int16)
    path.write_bytes(numbers.numpy().tobytes())
    return numbers


def mapped(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=SIZE // 2, dtype=torch.int16)


@pytest.mark.parametrize("least_rate", [0, inf], ids=["past the cache", "through it"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_copy_is_what_the_file_holds(tmp_path: Path, name: str, cold: bool, least_rate: float) -> None:
    path = tmp_path / "numbers"
    numbers = write_numbers(path)
    if cold:
        drop_from_cache(path)
    source, expected = VIEWS[name](mapped(path)), VIEWS[name](numbers)
    target = torch.zeros(expected.shape, dtype=torch.int16)
    with Copier((path,), Pace(least_rate)) as copier:
        copier.copy([source], [target])
    assert torch.equal(target, expected)


def test_several_are_put_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    numbers = matrix(write_numbers(path)).view(torch.bfloat16)
    drop_from_cache(path)
    source = matrix(mapped(path)).view(torch.bfloat16)
    joined = torch.zeros(ROWS, 2 * COLUMNS, dtype=torch.bfloat16)
    with Copier((path,), Pace(0)) as copier:
        copier.copy([source, numbers], list(joined.split([COLUMNS, COLUMNS], 1)))
    assert torch.equal(joined.view(torch.int16), torch.cat([numbers, numbers], 1).view(torch.int16))


def test_copying_does_not_fill_the_systems_cache(tmp_path: Path) -> None:
    if not reads_past_the_cache(tmp_path):
        pytest.skip("this file system reads through its cache only")
    path = tmp_path / "numbers"
    numbers = write_numbers(path)
    drop_from_cache(path)
    source = mapped(path)
    with Copier((path,), Pace(0)) as copier:
        if not copier.is_cold(source):
            pytest.skip("the system did not forget the file")
        assert not copier.is_cold(numbers)
        copier.copy([source], [torch.empty_like(numbers)])
        assert copier.is_cold(source)
        assert torch.equal(source, numbers)  # which reads it through the cache
        assert not copier.is_cold(source)


def test_a_file_that_fits_into_memory_is_found_in_the_cache_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    numbers = write_numbers(path)
    drop_from_cache(path)
    source = mapped(path)
    with Copier((path,), Pace(inf)) as copier:
        copier.copy([source], [torch.empty_like(numbers)])
        assert not copier.is_cold(source)


def test_what_was_read_past_the_cache_of_a_slow_disk_follows_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reads_past_the_cache(tmp_path):
        pytest.skip("this file system reads through its cache only")
    path, asked = tmp_path / "numbers", list[Stretch]()
    numbers = write_numbers(path)
    drop_from_cache(path)
    source, target = mapped(path), torch.empty_like(numbers)
    monkeypatch.setattr(copier_module, "_read_ahead", asked.append)
    with Copier((path,), Pace(1, clock=count(step=2 * SAMPLE).__next__)) as copier:  # any request takes long
        copier.copy([source[:1000]], [target[:1000]])
        copier.copy([source[1000:]], [target[1000:]])
        assert not copier.is_cold(source[4096:])
    assert [(stretch.offset, stretch.length) for stretch in asked] == [(0, 2000)]
    assert torch.equal(target, numbers)


def test_a_file_system_without_reads_past_the_cache_is_read_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read_all = tmp_path / "numbers", copier_module._read_all
    numbers = write_numbers(path)
    drop_from_cache(path)
    source, target, pace = mapped(path), torch.empty_like(numbers), Pace(0)

    def read(*request: Any) -> int:
        if pace.past_cache:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read_all(*request)

    monkeypatch.setattr(copier_module, "_read_all", read)
    with Copier((path,), pace) as copier:
        if not copier.is_cold(source):
            pytest.skip("the system did not forget the file")
        copier.copy([source], [target])
        assert not pace.past_cache and not copier.is_cold(source)
    assert torch.equal(target, numbers)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EMFILE, errno.ENOENT, errno.EACCES], ids=errno.errorcode.get)
def test_only_a_file_system_that_cannot_do_it_ends_reads_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, open_file, direct = tmp_path / "numbers", os.open, 1 << 30
    numbers = write_numbers(path)
    source, target, pace = mapped(path), torch.empty_like(numbers), Pace(0)

    def open_or_fail(name: Any, flags: int) -> int:
        if flags & direct:
            raise OSError(code, "no")
        return open_file(name, flags)

    monkeypatch.setattr(copier_module, "_DIRECT", direct)
    monkeypatch.setattr(copier_module, "is_cached", lambda _: False)
    monkeypatch.setattr(os, "open", open_or_fail)
    with Copier((path,), pace) as copier:
        copier.copy([source], [target])
    assert pace.past_cache is (code != errno.EINVAL)
    assert torch.equal(target, numbers)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    if not reads_past_the_cache(tmp_path):
        pytest.skip("this file system reads through its cache only, where such a file ends the process")
    path = tmp_path / "numbers"
    numbers = write_numbers(path)
    source = mapped(path)
    os.truncate(path, SIZE // 2)
    drop_from_cache(path)
    with (
        Copier((path,), Pace(0)) as copier,
        pytest.raises(ValueError, match=rf"{path} ends at byte {SIZE // 2}.*shorter"),
    ):
        copier.copy([source], [torch.empty_like(numbers)])
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_a_file_that_took_the_place_of_the_mapped_one_is_not_read_and_others_are_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "numbers", tmp_path / "other"
    numbers, pace = write_numbers(path), Pace(0)
    source = mapped(path)
    write_numbers(other)
    target = torch.empty_like(numbers)
    monkeypatch.setattr(copier_module, "_DIRECT", 0)  # a file system may not know it
    monkeypatch.setattr(copier_module, "is_cached", lambda _: False)
    with Copier((path,), pace) as copier:
        copier.copy([source[:1000]], [target[:1000]])
        os.replace(other, path)
        copier.copy([source[1000:]], [target[1000:]])  # by other threads, which open the other file
    assert torch.equal(target, numbers) and pace.past_cache


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
def test_a_copy_has_the_dtype_of_its_target(tmp_path: Path, cold: bool) -> None:
    path = tmp_path / "numbers"
    numbers = torch.randn(SIZE // 4)
    path.write_bytes(numbers.numpy().tobytes())
    if cold:
        drop_from_cache(path)
    source = torch.from_file(str(path), shared=False, size=len(numbers))
    target = torch.zeros(len(numbers), dtype=torch.bfloat16)
    with Copier((path,), Pace(0)) as copier:
        copier.copy([source], [target])
    assert torch.equal(target, numbers.bfloat16())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists open files")
@pytest.mark.parametrize("fails", [False, True], ids=["readable", "no reads past the cache"])
def test_few_files_are_open_and_none_is_left_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    paths, most, read_all = [tmp_path / str(number) for number in range(40)], [0], copier_module._read_all

    def number_of_open_files() -> int:
        folder = os.path.realpath(tmp_path)
        return sum(file.path.startswith(folder) for file in psutil.Process().open_files())

    def read(*request: Any) -> int:
        most[0] = max(most[0], number_of_open_files())
        if fails:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read_all(*request)

    monkeypatch.setattr(copier_module, "is_cached", lambda _: False)
    monkeypatch.setattr(copier_module, "_read_all", read)
    for path in paths:
        path.write_bytes(path.name.encode().ljust(10_000, b"."))
    sources = [torch.from_file(str(path), size=10_000, dtype=torch.uint8) for path in paths]
    targets = [torch.empty_like(source) for source in sources]
    with Copier(tuple(paths), Pace(inf)) as copier:
        copier.copy(sources, targets)
        copier.copy(sources, targets)
    assert all(map(torch.equal, sources, targets))
    assert 0 < most[0] <= 2 * NUM_THREADS  # what is read, and what is read ahead
    assert number_of_open_files() == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is cached")
def test_what_linux_says_of_files_of_others_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "numbers"
    numbers = write_numbers(path)
    source = mapped(path)
    assert torch.equal(source, numbers)
    with Copier((path,), Pace(inf)) as copier:
        assert not copier.is_cold(source)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert not copier.is_cold(source)
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert copier.is_cold(source)


@settings(deadline=None)
@given(st.data())
def test_pieces_are_all_of_a_tensor_once_and_none_is_long(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    source = torch.arange(torch.Size(sizes).numel()).view(sizes)
    source = source.permute(data.draw(st.permutations(range(len(sizes)))))
    dim = data.draw(st.integers(0, len(sizes) - 1))
    start = data.draw(st.integers(0, source.shape[dim] - 1))
    source = source.narrow(dim, start, source.shape[dim] - start)
    target = torch.full(source.shape, -1)
    limit = data.draw(st.integers(8, 400))
    last = -1
    for part, place in pieces(source, target, limit):
        assert span(part) <= limit and place.eq(-1).all()
        assert part.min() > last, "not in the order of memory"
        last = int(part.max()) if source.is_contiguous() else last
        place.copy_(part)
    assert torch.equal(target, source)
