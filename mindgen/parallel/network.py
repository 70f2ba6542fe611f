"""Makes groups: over shared memory where their ranks can, over torch.distributed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindgen.device import library_name
from mindgen.parallel.arena import Sharing
from mindgen.parallel.group import LONGEST_WAIT, STEP_TIMEOUT, DistributedGroup, Group, SingleGroup
from mindgen.parallel.process import Process
from mindgen.parallel.shm import SharedGroup
from mindgen.parallel.threads import available_cores
from mindgen.parallel.topology import Topology
from mindgen.parallel.watchdog import Watchdog


@dataclass(frozen=True)
class Network:
    """What this rank knows of all others when groups are made. All ranks make all groups, in the same order."""

    rank: int
    device: torch.device
    watchdog: Watchdog
    sharing: Sharing
    processes: Sequence[Process]  # of all ranks

    def groups(self, tp: int, pp: int) -> tuple[Group, Group, Group]:
        """This rank's tensor and pipeline group among the first tp * pp ranks, and the group of all of these."""
        places = [Topology(other, tp, pp) for other in range(tp * pp)]
        stages = [place.tp_ranks for place in places if place.tp_rank == 0]
        columns = [place.pp_ranks for place in places if place.is_first_stage]
        everyone = self._group([range(tp * pp)])
        return self._group(stages), self._group(columns), everyone

    def close(self) -> None:
        dist.destroy_process_group()
        if self.sharing.arena is not None:
            self.sharing.arena.close()

    def _group(self, rank_lists: Iterable[Sequence[int]]) -> Group:
        """Makes all of these groups and returns the one that this rank is in; a group of one if none."""
        mine: Group = SingleGroup()
        for ranks in rank_lists:
            if len(ranks) > 1:
                made = self._share(ranks) if self.sharing.covers(ranks) else self._distribute(ranks)
                mine = made or mine
        return mine

    def _share(self, ranks: Sequence[int]) -> Group | None:
        arena = self.sharing.arena
        if arena is None or not self.sharing.covers((self.rank, *ranks)):
            return None  # they are on another host
        if self.rank not in ranks:
            SharedGroup.reserve(arena, len(ranks))
            return None
        neighbours = self.sharing.hosts.count(self.sharing.hosts[self.rank])
        crowded = neighbours > available_cores()
        return SharedGroup(ranks, self.rank, arena, self.processes, crowded, STEP_TIMEOUT, self.watchdog.explain)

    def _distribute(self, ranks: Sequence[int]) -> Group | None:
        cpu = dist.new_group(list(ranks), backend="gloo", timeout=LONGEST_WAIT)
        on_cpu = self.device.type == "cpu"
        own = None if on_cpu else dist.new_group(list(ranks), backend=library_name(self.device))
        if self.rank not in ranks:
            return None
        return DistributedGroup(ranks, cpu, own, STEP_TIMEOUT, self.watchdog.explain)
