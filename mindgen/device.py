"""The one file that says cuda or npu. Importing it needs neither."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from mindgen.config import named

CHOICES = ("auto", "cpu", "cuda", "npu")
LIBRARIES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}  # who carries a device's tensors between ranks


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this rank: `name` is auto, cpu, cuda or npu; the accelerator's index is `local_rank`.

    `auto` takes an NPU if one can be used, else a CUDA device, else the CPU. Raises ValueError when the wanted
    device is absent, saying what is there and what to do, or when the host has fewer devices than local ranks.
    """
    if name not in CHOICES:
        raise ValueError(f"unknown device {name!r}; choose one of {', '.join(CHOICES)}")
    if name == "cpu":
        return torch.device("cpu")
    absent = {kind: reason for kind, reason in (("npu", _npu_is_absent()), ("cuda", _cuda_is_absent())) if reason}
    counts = {kind: _module(kind).device_count() for kind in ("npu", "cuda") if kind not in absent}
    return torch.device(choose(name, local_rank, counts, absent))


def choose(name: str, local_rank: int, counts: Mapping[str, int], absent: Mapping[str, str]) -> str:
    """The device's name by the rule of `pick_device`.

    `counts` has the number of devices of each usable kind, best kind first; `absent` says why others are not usable.
    """
    if name == "auto":
        name = next(iter(counts), "cpu")
    if name == "cpu":
        return name
    if name not in counts:
        raise ValueError(f"no {name} device: {absent[name]}; available here: {', '.join([*counts, 'cpu'])}")
    if not 0 <= local_rank < counts[name]:
        raise ValueError(
            f"local rank {local_rank} wants {name} device {local_rank}, but this host shows {counts[name]};"
            f" start at most {counts[name]} ranks here, or set {named('device')} to cpu"
        )
    return f"{name}:{local_rank}"


def set_current(device: torch.device) -> None:
    """Makes `device` the one that this process's kernels and collectives use. Called before ranks connect."""
    if device.type != "cpu":
        _module(device.type).set_device(device)


def library_name(device: torch.device) -> str:
    """The collective library of the device's own tensors: gloo, nccl or hccl."""
    return LIBRARIES[device.type]


def backend_name(device: torch.device) -> str:
    """What torch.distributed is asked for: CPU tensors always travel too, for they carry control messages."""
    return "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{library_name(device)}"


def sampling_device(device: torch.device) -> torch.device:
    """Where tokens are drawn: exact sampling computes in float64, which NPUs do not have."""
    return torch.device("cpu") if device.type == "npu" else device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it."""
    if device.type != "cpu":
        _module(device.type).synchronize(device)


def no_graphs(device: torch.device) -> str | None:
    """Why what the device is asked for cannot be captured; None if it can."""
    reasons = {"cpu": "a CPU has none", "npu": "those of an NPU are not captured yet"}
    return reasons.get(device.type)


class Recorder:
    """Captures graphs on one device. They share the memory of what they compute in between: one runs at a time.

    torch has one stream for captures in a process, so that its threads take turns.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    _turn = Lock()

    def __init__(self, device: torch.device):
        self._module = _module(device.type)
        self._pool = self._module.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does again all that `run` asks of the device, and the tensor that it fills each time.

        `run` has run before. It reads and writes tensors that stay where they are, and waits for no value. Only this
        thread is held to that: others may go on using the device.
        """
        graph = self._module.CUDAGraph()
        with self._turn, self._module.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated. On the CPU: what the kernel calls available, within the cgroup's limit."""
    if device.type != "cpu":
        return int(_module(device.type).mem_get_info(device)[0])
    return max(0, min([_available_memory(), *_cgroup_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]))


def _module(kind: str):  # type: ignore[no-untyped-def]  # torch.npu exists only where torch_npu is installed
    """torch.cuda or torch.npu."""
    if kind == "npu":
        import torch_npu  # noqa: F401  # adds torch.npu
    return getattr(torch, kind)


def _cuda_is_absent() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    return None


def _npu_is_absent() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed; on an Ascend host install the extra: pip install 'mindgen[npu]'"
    try:
        available = _module("npu").is_available()
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"torch_npu does not load ({reason}); source the set_env.sh of your CANN installation first"
    return None if available else "torch_npu sees no device; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        import psutil  # hosts without /proc

        return int(psutil.virtual_memory().available)
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kibibytes * 1024


def _cgroup_rooms(membership: Path, mount: Path) -> list[int]:
    """Bytes left under the memory limit of this process's cgroup and of each group around it (versions 2 and 1)."""
    try:
        entries = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    rooms = []
    for _, controllers, path in entries:
        if controllers == "":
            names = ("memory.max", "memory.current", "")
            root = mount
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            root = mount / "memory"
        else:
            continue
        inner = root / path.lstrip("/")
        rooms += [_room(folder, *names) for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return [room for room in rooms if room is not None]


def _room(folder: Path, limit_name: str, usage_name: str, prefix: str) -> int | None:
    """Limit minus use, where file cache does not count as use. None without a limit."""
    try:
        limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cache = sum(int(fields.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return int(limit) - usage + cache
