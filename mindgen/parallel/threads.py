"""How many compute threads a rank gets: ranks of one host share its cores."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may use: its affinity, within the cgroup's CPU quota; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def threads_per_rank(local_world_size: int) -> int:
    return max(1, available_cores() // local_world_size)


def limit_threads(local_world_size: int) -> int:
    """Gives torch this rank's share of the cores, unless OMP_NUM_THREADS decides. Returns the number of threads."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), threads_per_rank(local_world_size)))
    return torch.get_num_threads()
