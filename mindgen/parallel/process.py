"""A process that another one can recognise, and end, without mistaking a later one for it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process id is only a number until the boot of its host and its start time are known too."""

    boot: str
    pid: int
    start: str  # in clock ticks since boot; empty where /proc does not tell

    def __str__(self) -> str:
        return f"{self.boot} {self.pid} {self.start}"

    @classmethod
    def parse(cls, text: str) -> Process:
        boot, pid, start = text.split(" ")
        return cls(boot, int(pid), start)

    @classmethod
    def at(cls, pid: int) -> Process:
        """The process that has this id on this host now."""
        return cls(_read("/proc/sys/kernel/random/boot_id").strip(), pid, _start_time(pid))

    @classmethod
    def mine(cls) -> Process:
        return cls.at(os.getpid())

    @property
    def is_alive(self) -> bool:
        """Whether it still runs on this host. One that has ended and waits for its parent does not."""
        fields = _fields(self.pid)
        return len(fields) > 19 and fields[19] == self.start and fields[0] not in ("Z", "X")

    def kill(self) -> None:
        """Ends it if it is on this host and still the same process; nothing otherwise."""
        if self.start and Process.at(self.pid) == self:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def _start_time(pid: int) -> str:
    """Field 22 of /proc/<pid>/stat."""
    fields = _fields(pid)
    return fields[19] if len(fields) > 19 else ""


def _fields(pid: int) -> list[str]:
    """Of /proc/<pid>/stat, those behind the command name, which may hold spaces: from field 3, the state, on."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
