"""Groups of real ranks: a world of 4 is started once a kind, and every check in `group_program.py` is one test here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mindgen.parallel.group import SingleGroup
from mindgen.parallel.place import COLLECTIVES
from mindgen.parallel.topology import SINGLE
from mindgen.parallel.world import RankError, connect
from tests.parallel.group_program import CHECKS

PROGRAM = Path(__file__).with_name("group_program.py")


@pytest.fixture(scope="module", params=["auto", "gloo"])
def results(request):
    environ = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1", COLLECTIVES: request.param}
    command = [sys.executable, str(PROGRAM)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_in_a_world_of_four(results, name):
    assert results[name] is None


def test_a_group_of_one_changes_nothing():
    group, tensor = SingleGroup(), torch.arange(3.0)
    assert group.all_reduce(tensor) is group.broadcast(tensor) is group.all_gather(tensor, 0) is tensor
    group.barrier()
    group.close()


def test_one_rank_alone_connects_to_nobody_and_still_agrees():
    with connect(SINGLE, torch.device("cpu")) as world:
        assert not torch.distributed.is_initialized()
        world.agree(None)
        world.same("the spec", "abc")
        with world.loading():
            assert world.part(1, 1) is world
        with pytest.raises(RankError, match=r"^no such file$"):
            world.agree("no such file")
