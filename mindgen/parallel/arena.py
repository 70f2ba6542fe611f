"""Memory that the ranks of one host share. It has no name in any directory, so that nothing is left when they die.

The first rank of a host makes an anonymous file, the others open it through /proc and say in the store whether that
worked; all ranks decide alike from what all said. Groups then take stretches of the file, every rank of the host in
the same order, so that they need not talk about where.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mindgen.parallel.process import Process

ROOM = 1 << 42  # bytes of address space in the file; memory is used only where something is written
STRONG_ORDER = ("x86_64", "AMD64")  # processors that never show a rank's stores to others in another order
FUTEX = 202  # the system call's number on x86-64
FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 0, 1, 1 << 30
TICK_NANOSECONDS = 50_000_000
LINE = 16  # words; a counter has 128 bytes of its own, for processors fetch lines in pairs


class Keys(Protocol):
    """The part of a torch.distributed store that is used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Stretch:
    """A part of an arena: `words` of 8 bytes from its start on, and its `address` in this process."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.words = memoryview(memory).cast("q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._system_call = ctypes.CDLL(None).syscall
        self._system_call.argtypes = (
            *(ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32),
        )
        self._tick = (ctypes.c_long * 2)(0, TICK_NANOSECONDS)

    def wake(self, index: int) -> None:
        """Wakes all who sleep on the word at `index`. To be called after it was changed."""
        self._system_call(FUTEX, self.address + 8 * index, FUTEX_WAKE, EVERYBODY, None, None, 0)

    def sleep(self, index: int, value: int) -> None:
        """Sleeps until `wake`, a signal or the end of a tick; not at all when the word is no longer `value`."""
        self._system_call(FUTEX, self.address + 8 * index, FUTEX_WAIT, value & 0xFFFFFFFF, self._tick, None, 0)


class Arena:
    """An anonymous file that the ranks of this host have all opened. `take` is called by all of them alike."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._taken = mmap.PAGESIZE  # the first page holds the password

    @classmethod
    def make(cls, password: bytes) -> Arena:
        descriptor = os.memfd_create("mindgen")
        os.ftruncate(descriptor, ROOM)
        os.pwrite(descriptor, password, 0)
        return cls(descriptor)

    @classmethod
    def open(cls, process: Process, descriptor: int, password: bytes) -> Arena:
        """Raises OSError when the file cannot be opened, or is another one than the password says."""
        arena = cls(os.open(f"/proc/{process.pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC))
        if os.pread(arena.descriptor, len(password), 0) != password:
            raise OSError(f"descriptor {descriptor} of process {process.pid} is not the ranks' memory")
        return arena

    def take(self, size: int) -> int:
        """The offset of `size` bytes, all zero, that nobody else was given."""
        offset = self._taken
        self._taken += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        assert self._taken <= ROOM, "too many groups were made"
        return offset

    def close(self) -> None:
        """What is mapped stays as long as it is used; nothing more can be."""
        os.close(self.descriptor)

    def map(self, offset: int, size: int) -> Stretch:
        return Stretch(mmap.mmap(self.descriptor, size, offset=offset))


@dataclass(frozen=True)
class Sharing:
    """What all ranks know of who shares memory with whom."""

    arena: Arena | None  # of this host
    hosts: tuple[int | None, ...]  # of every rank: the first rank of its host, None where it shares nothing
    reason: str = ""  # why ranks of this host cannot share, where they wanted to

    def covers(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks share memory with each other; the same answer on every rank."""
        return self.hosts[ranks[0]] is not None and len({self.hosts[rank] for rank in ranks}) == 1


def share_memory(keys: Keys, rank: int, processes: Sequence[Process], wanted: bool) -> Sharing:
    """Opens the memory of this host's ranks. Every rank calls it; one that does not want to share shares nothing."""
    neighbours = [other for other, process in enumerate(processes) if process.boot == processes[rank].boot]
    arena, reason = _try_to_share(keys, rank, neighbours[0], processes, wanted)
    keys.set(f"shares/{rank}", f"{neighbours[0]} {reason}" if arena is None else f"{neighbours[0]}")
    said = [keys.get(f"shares/{other}").decode().partition(" ") for other in range(len(processes))]
    reasons = [said[other][2] for other in neighbours if said[other][2]]
    hosts = tuple(None if refused else int(leader) for leader, refused, _ in said)
    return Sharing(arena, hosts, reasons[0] if reasons else "")


def _try_to_share(
    keys: Keys, rank: int, leader: int, processes: Sequence[Process], wanted: bool
) -> tuple[Arena | None, str]:
    """The arena, or why there is none. The leader's word is always said, for the others wait for it."""
    key, said = f"arena/{leader}", ""
    try:
        if not wanted:
            return None, ""
        _check_host(rank, processes)
        if rank != leader:
            return _open(keys.get(key).decode(), processes[leader]), ""
        password = secrets.token_hex(16)
        arena = Arena.make(password.encode())
        said = f"{arena.descriptor} {password}"
        return arena, ""
    except OSError as error:
        return None, str(error)
    finally:
        if rank == leader:
            keys.set(key, said)


def _check_host(rank: int, processes: Sequence[Process]) -> None:
    if not hasattr(os, "memfd_create") or not processes[rank].start:
        raise OSError("this system has no anonymous files or no /proc")
    if platform.machine() not in STRONG_ORDER:
        raise OSError(f"{platform.machine()} processors may reorder what a rank writes")
    for other, process in enumerate(processes):
        if process.boot == processes[rank].boot and not process.is_alive:
            raise OSError(f"process {process.pid} of rank {other} cannot be seen from here")


def _open(said: str, leader: Process) -> Arena:
    if not said:
        raise OSError("the first rank of this host shares nothing")
    descriptor, password = said.split()
    return Arena.open(leader, int(descriptor), password.encode())
