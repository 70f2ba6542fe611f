"""Starts `rank_program.py` as a user starts a command, and lets a test see and end its ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAM = str(Path(__file__).with_name("rank_program.py"))
ROOT = Path(__file__).parents[2]
PATIENCE = 90.0  # seconds; how long a start may take on a machine with other things to do


class Run:
    """One run of the program: its process (rank 0 or torchrun), what it wrote to stderr, and its ranks' processes."""

    def __init__(self, act: str, size: int, launcher: tuple[str, ...] = (), **variables: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, *launcher, PROGRAM, act, str(size)]
        self.size = size
        self.process = subprocess.Popen(command, env=environ, stderr=self._errors, start_new_session=True)
        self.code: int | None = None

    @property
    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    @property
    def messages(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("mindgen:")]

    @property
    def ranks(self) -> dict[int, psutil.Process]:
        found = re.findall(r"rank (\d+) is process (\d+)", self.errors)
        return {int(rank): psutil.Process(int(pid)) for rank, pid in found if psutil.pid_exists(int(pid))}

    def wait_until_working(self) -> dict[int, psutil.Process]:
        """Waits until all ranks have started and rank 0 (or the last) has said that it works. Returns the ranks."""
        self._wait(lambda: "\nworking\n" in self.errors and len(self.ranks) == self.size, "ranks to work")
        return self.ranks

    def wait_for_end(self, seconds: float = PATIENCE) -> float:
        """Waits until the process and all ranks have ended. Returns the seconds that it took."""
        start = time.monotonic()
        self.code = self.process.wait(seconds)
        self._wait(lambda: not self.survivors(), "all ranks to end", seconds)
        return time.monotonic() - start

    def survivors(self) -> list[psutil.Process]:
        return [process for process in self.ranks.values() if _is_alive(process)]

    def end(self) -> None:
        for process in self.survivors():
            process.kill()
        self.process.kill()
        self.process.wait()
        self._errors.close()

    def interrupt(self) -> None:
        """Ctrl-C at a terminal: the whole foreground group hears it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None or what != "ranks to work", (
                f"ended too early; stderr was:\n{self.errors}"
            )
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}; stderr was:\n{self.errors}"
            time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
