"""What this machine can do: read bandwidth, matrix rate, and the memory that ranks hold."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindgen.device import synchronize
from mindgen.layers.packed import linear, packed
from mindgen.parallel.threads import available_cores

_BUFFER = 256 << 20  # bytes: several times the last cache of most hosts
_MATRIX = (512, 2048, 5632)  # rows, inputs, outputs: a prompt through an MLP of a small model
_TIMES = 5
_ENOUGH = 0.4  # seconds after which fewer times will do
UNSTEADY = 0.15  # a change of the machine that makes figures taken before and after it hard to compare


@dataclass(frozen=True)
class Probe:
    """The best that was seen: bytes read a second, FLOPs a second in the model's dtype."""

    read_rate: float
    matrix_rate: float

    def change(self, other: Probe) -> float:
        """How far two probes differ, as a share of the smaller rate."""
        pairs = ((self.read_rate, other.read_rate), (self.matrix_rate, other.matrix_rate))
        return max(max(pair) / min(pair) - 1 for pair in pairs)

    def best(self, other: Probe) -> Probe:
        """The higher rates of two probes."""
        return Probe(max(self.read_rate, other.read_rate), max(self.matrix_rate, other.matrix_rate))


class Machine:
    """The device of rank 0, with the CPU threads that all ranks of a run have together.

    Other ranks wait while rank 0 probes. On an accelerator the rates of rank 0's device count once for each rank.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, num_ranks: int):
        self.device, self.dtype, self.num_ranks = device, dtype, num_ranks
        self.num_threads = max(1, min(num_ranks * torch.get_num_threads(), available_cores()))
        self._times = 1 if device.type == "cpu" else num_ranks

    def probe(self) -> Probe:
        """A second of measuring, or two."""
        return Probe(self.read_rate(), self._matrix_rate())

    def read_rate(self) -> float:
        """Bytes a second, from a buffer too large for the caches."""
        with self.all_threads():
            numbers = torch.ones(_BUFFER // 4, device=self.device)
            return self._times * _BUFFER / self._best(numbers.sum)

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """Lets this process compute with the threads of all ranks."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _matrix_rate(self) -> float:
        rows, inputs, outputs = _MATRIX
        x = torch.ones(rows, inputs, dtype=self.dtype, device=self.device)
        plain = torch.ones(outputs, inputs, dtype=self.dtype, device=self.device)
        with self.all_threads(), torch.inference_mode():
            seconds = min(self._best(partial(linear, x, weight)) for weight in (plain, packed(plain)))
        return self._times * 2 * rows * inputs * outputs / seconds

    def _best(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest of several runs, after one to warm up."""
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) <= _TIMES and sum(seconds) < _ENOUGH):
            synchronize(self.device)
            started = time.perf_counter()
            work()
            synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])


def describe_host(machine: Machine) -> dict[str, Any]:
    """What the figures were taken on."""
    import psutil

    return {
        "processor": _processor(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": _device_name(machine.device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


class Memory:
    """The memory that the processes of the ranks hold, rank 0 first: made when they have loaded, asked later.

    Ranks of other hosts are not seen.
    """

    def __init__(self, machine: Machine):
        self._machine = machine
        self._ranks = _rank_processes(machine.num_ranks)
        self._loaded = [_held(pid) for pid in self._ranks]

    def now(self) -> dict[str, Any]:
        """Bytes of each rank when it had loaded, with the peak until then, and now; of rank 0's device its peak."""
        ranks = [
            _prefixed("loaded_", loaded) | _held(pid) for pid, loaded in zip(self._ranks, self._loaded, strict=True)
        ]
        for rank in ranks:
            del rank["peak_rss_bytes"]  # it would hold the buffers of the probes
        memory: dict[str, Any] = {"ranks": ranks, "num_ranks_not_seen": self._machine.num_ranks - len(ranks)}
        device = self._machine.device
        if device.type != "cpu":
            memory["device_peak_bytes"] = int(torch.get_device_module(device).max_memory_allocated(device))
        return memory


def _rank_processes(num_ranks: int) -> list[int]:
    """This process and the other ranks: those that it started, or that torchrun started beside it."""
    import psutil

    own, launcher = psutil.Process(), psutil.Process().parent()
    for relatives in (own.children(), launcher.children() if launcher else []):
        others = [relative.pid for relative in relatives if relative.pid != own.pid and _is_rank(relative)]
        if len(others) == num_ranks - 1:
            return [own.pid, *others]
    return [own.pid]


def _is_rank(process: Any) -> bool:
    import psutil

    try:
        return {"-m", "mindgen"} <= set(process.cmdline())
    except psutil.Error:
        return False


def _prefixed(prefix: str, values: dict[str, int | None]) -> dict[str, int | None]:
    return {prefix + name: value for name, value in values.items()}


def _held(pid: int) -> dict[str, int | None]:
    """All that is resident, the anonymous part of it, and the peak; None for what the system does not say."""
    names = {"rss_bytes": "VmRSS", "anonymous_bytes": "RssAnon", "peak_rss_bytes": "VmHWM"}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        import psutil

        return dict.fromkeys(names) | {"rss_bytes": psutil.Process(pid).memory_info().rss}
    found = dict(line.split(":", 1) for line in lines)
    return {ours: int(found[theirs].split()[0]) * 1024 if theirs in found else None for ours, theirs in names.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))
