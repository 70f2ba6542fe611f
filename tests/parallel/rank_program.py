"""The program that `test_faults.py` runs as ranks: `rank_program.py <act> <tp>`. It behaves as a command does."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mindgen.parallel.launch import Ranks, start_ranks

if TYPE_CHECKING:
    from mindgen.parallel.world import World


def main(arguments: list[str]) -> int:
    """Returns 2 for a user's error, which rank 0 alone tells, and 130 for Ctrl-C."""
    act, tp = arguments[0], int(arguments[1])
    if act == "confined":  # to files far smaller than what ranks share
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    try:
        with start_ranks(tp, arguments, program=(__file__,)) as ranks:
            say(f"rank {ranks.place.rank} is process {os.getpid()}")
            return UNCONNECTED[act](ranks) if act in UNCONNECTED else connected(act, tp, ranks)
    except KeyboardInterrupt:
        return 130


def connected(act: str, tp: int, ranks: Ranks) -> int:
    import torch

    from mindgen.parallel.topology import Topology
    from mindgen.parallel.world import RankError, connect

    try:
        with connect(Topology(ranks.place.rank, tp), torch.device("cpu"), 90.0, ranks) as world:
            return CONNECTED[act](world)
    except RankError as error:
        if ranks.place.rank == 0:
            say(f"mindgen: {error}")
        return 2


def say(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def work(world: World) -> int:
    """Sums, and checks every sum, until the file STOP_FILE exists, or for two minutes."""
    import torch

    from mindgen.parallel.group import FOREVER

    deadline, stop_file = time.monotonic() + 120, Path(os.environ.get("STOP_FILE", "/nowhere"))
    if world.everyone.rank == 0:
        say("working")
    while True:
        more = torch.tensor([int(time.monotonic() < deadline and not stop_file.exists())])
        if not world.everyone.broadcast(more, 0, FOREVER).item():
            return 0
        total = world.everyone.all_reduce(torch.ones(1000))
        assert total.tolist() == [float(world.everyone.size)] * 1000
        time.sleep(0.005)


def idle(world: World) -> int:
    """Followers wait for rank 0, which waits for its user."""
    import torch

    from mindgen.parallel.group import FOREVER

    if world.everyone.rank == 0:
        say("working")
        time.sleep(120)
    world.everyone.broadcast(torch.zeros(1), 0, FOREVER)
    return 0


def fail_on_one(world: World) -> int:
    if world.everyone.rank == 1:
        raise OSError("the disk is on fire")
    return work(world)


def disagree(world: World) -> int:
    world.agree("shard 1 is torn" if world.everyone.rank == 1 else None)
    return 0


def sleep(ranks: Ranks) -> int:
    say("working" if ranks.place.rank == ranks.place.world_size - 1 else "not working")
    time.sleep(120)
    return 0


CONNECTED: dict[str, Callable[[World], int]] = {
    "work": work,
    "confined": work,
    "idle": idle,
    "fail_on_one": fail_on_one,
    "disagree": disagree,
}
UNCONNECTED: dict[str, Callable[[Ranks], int]] = {
    "sleep": sleep,
    "exit_with_three": lambda ranks: 3,
    "exit_with_rank": lambda ranks: ranks.place.rank or sleep(ranks),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
