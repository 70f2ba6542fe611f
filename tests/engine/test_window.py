"""A real model whose layers all slide: what none of them sees any more makes room, and no answer shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mindgen.config import EngineConfig
from mindgen.engine.blocks import BlockPool
from mindgen.engine.engine import Engine
from mindgen.engine.request import Request, SamplingParams
from mindgen.engine.runner import Runner
from mindgen.engine.scheduler import Scheduler
from mindgen.parallel.topology import SINGLE
from mindgen.parallel.world import connect
from mindgen.startup.opened import Opened
from mindgen.startup.ready import make_engine, make_runner
from mindgen.weights.huggingface import open_huggingface
from tests.checkpoints import prompts

CPU = torch.device("cpu")
WINDOW, BLOCK_SIZE, CHUNK, NUM_NEW = 24, 8, 8, 80


def ask() -> Request:
    return Request(0, tuple(prompts(3)[0]), SamplingParams(max_new_tokens=NUM_NEW, temperature=0.0))


def answer(engine: Engine) -> tuple[list[int], int]:
    """The tokens of the request, and the blocks that were used at most."""
    tokens, most = [], 0
    engine.submit(ask())
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
        most = max(most, engine.scheduler.stats.num_used_blocks)
    assert engine.scheduler.stats.num_used_blocks == 0
    return tokens, most


def without_window(runner: Runner) -> Engine:
    assert runner.cache
    return Engine(Scheduler(BlockPool(runner.cache.num_blocks, BLOCK_SIZE), max_batch_tokens=CHUNK), runner)


@pytest.mark.parametrize("attention", ["cpu", "sdpa", "reference"])
def test_blocks_behind_the_window_are_given_back(checkpoint: Callable[[str], Path], attention: str) -> None:
    source = open_huggingface(checkpoint("mistral"))
    assert source.spec.widest_window == WINDOW
    config = EngineConfig(
        "mistral", 1, attention=attention, block_size=BLOCK_SIZE, max_batch_tokens=CHUNK, kv_cache_memory=0.004
    )
    with connect(SINGLE, CPU) as world:
        runner = make_runner(config, source, world, CPU, 1)
        engine = make_engine(Opened(config, source), runner)
        expected, all_blocks = answer(without_window(runner))
        for memory in (*runner.cache.keys, *runner.cache.values):  # type: ignore[union-attr]
            memory.fill_(1e4)  # what others leave in blocks that this request no longer owns, or does not own yet
        tokens, most = answer(engine)
    assert tokens == expected and len(tokens) == NUM_NEW
    assert all_blocks == -(-(len(ask().prompt) + NUM_NEW - 1) // BLOCK_SIZE)
    assert most <= (WINDOW + CHUNK - 2) // BLOCK_SIZE + 2 < all_blocks // 2
    assert engine.scheduler.stats.num_preemptions == 0


@pytest.mark.parametrize(("case", "window"), [("mistral", WINDOW), ("llama2", None), ("gemma2", None)])
def test_only_where_every_layer_slides(checkpoint: Callable[[str], Path], case: str, window: int | None) -> None:
    assert open_huggingface(checkpoint(case)).spec.widest_window == window
