"""Every family on a CUDA device, with graphs and without, gives what it gives on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindgen.config import EngineConfig
from mindgen.device import Recorder, pick_device
from mindgen.engine.graphs import StepGraphs
from mindgen.parallel.world import World
from mindgen.startup.opened import Opened
from mindgen.startup.ready import describe, make_runner
from mindgen.weights.open import open_source
from tests.model.test_graphs import DENSE, answers, check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize("graphs", [False, True], ids=["eagerly", "with graphs"])
def test_answers_are_those_of_the_cpu(case: str, graphs: bool, checkpoint: Callable[[str], Path]) -> None:
    config = EngineConfig(str(checkpoint(case)), dtype="fp32", attention="sdpa", block_size=8, max_batch_tokens=48)
    config = replace(config, kv_cache_memory=0.004)
    source = open_source(checkpoint(case))
    expected = answers(Opened(config, source), make_runner(config, source, World(), torch.device("cpu"), 1))
    config = replace(config, device="cuda", capture_graphs=graphs)
    runner = make_runner(config, source, World(), pick_device("cuda"), 1)
    check(answers(Opened(config, source), runner), expected)
    is_replayed = isinstance(runner.graphs, StepGraphs) and runner.graphs.num_replayed > 0
    assert is_replayed == (graphs and case in DENSE)
    if graphs:
        captured = (
            "graphs: steps of decoding are captured" if is_replayed else "graphs: none are captured: which experts"
        )
        assert describe(Opened(config, source), runner)[-1].startswith(captured)


def test_a_graph_does_again_what_was_asked_for() -> None:
    with torch.inference_mode():  # as the runner computes
        numbers = torch.arange(4, device="cuda")
        numbers.square()
        replay, squares = Recorder(numbers.device)(numbers.square)
        numbers += 1
        replay()
    assert squares.tolist() == [1, 4, 9, 16]
