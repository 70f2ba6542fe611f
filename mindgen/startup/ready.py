"""A rank made ready: weights loaded, cache allocated, the engine on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mindgen.attention.backend import choose_backend
from mindgen.config import PRECISIONS, EngineConfig, named
from mindgen.engine.blocks import BlockPool
from mindgen.engine.engine import Engine
from mindgen.engine.graphs import StepGraphs, why_no_graphs
from mindgen.engine.kv_cache import KVCache
from mindgen.engine.runner import Runner
from mindgen.engine.scheduler import Scheduler
from mindgen.model.build import build_stage
from mindgen.model.decoder import Decoder
from mindgen.parallel.world import World
from mindgen.spec import ModelSpec
from mindgen.startup.cache_size import MOST_SEQUENCES, check_asked, most_used, num_blocks
from mindgen.startup.opened import Opened
from mindgen.weights.load import load_weights
from mindgen.weights.source import Source

Made = TypeVar("Made")


def computing_dtype(config: EngineConfig, spec: ModelSpec) -> torch.dtype:
    """The precision of weights and computation."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[config.dtype] if config.dtype else spec.dtype)
    return dtype


def make_runner(config: EngineConfig, source: Source, world: World, device: torch.device, local_ranks: int) -> Runner:
    """Loads this rank's part of the model and gives it a cache.

    A collective. Raises RankError on all ranks, with the first one's reason, if any rank cannot be made ready.
    """
    _together(world, lambda: source.check() if world.topology.rank == 0 else None)
    _together(world, lambda: check_asked(config, device, local_ranks))
    model = _together(world, lambda: _build(config, source, world, device))
    backend = _together(world, lambda: choose_backend(config.attention, model.scores, device, model.dtype))
    world.same(f"the attention backend, which {named('attention')} can settle,", backend.name)
    _together(world, lambda: _load(config, source, world, model))
    cache = graphs = None
    no_graphs = why_no_graphs(device, world.topology, model, backend, config.use_kv_cache)
    captures = config.capture_graphs and no_graphs is None
    if config.use_kv_cache:
        _together(world, lambda: check_asked(config, device, local_ranks))  # the weights took their part
        blocks = num_blocks(config, source.spec, model, world, local_ranks)
        sizes = (blocks, config.block_size, model.num_kv_heads, model.head_dim)
        cache = _together(world, lambda: KVCache(model.num_layers, *sizes, model.dtype, device, has_spare=captures))
        graphs = StepGraphs(model, cache, backend) if captures else None
    return Runner(model, cache, backend, world, device, graphs, no_graphs)


def describe(model: Opened, runner: Runner) -> tuple[str, ...]:
    """What was settled, a line each: the cache, and graphs if they were asked for."""
    cache = _describe_cache(model, runner)
    if not model.config.capture_graphs:
        return (cache,)
    used = (
        f"none are captured: {runner.no_graphs}"
        if runner.no_graphs
        else "steps of decoding are captured, and replayed when their size comes again"
    )
    return cache, f"graphs: {used}"


def _describe_cache(model: Opened, runner: Runner) -> str:
    """One line on how much fits into a rank's cache, and that no more could be used where it is less than asked for."""
    cache = runner.cache
    if cache is None:
        return "no cache: every step computes its sequences anew"
    gib = sum(memory.nbytes for memory in (*cache.keys, *cache.values)) / 2**30
    tokens = cache.num_blocks * cache.block_size
    line = f"cache: {cache.num_blocks} blocks of {cache.block_size} = {tokens} tokens, {gib:.2f} GiB a rank"
    config, asked = model.config, model.config.kv_cache_memory
    more = asked is not None and asked >= gib * (1 + 1 / cache.num_blocks)
    if more and cache.num_blocks == most_used(config, model.source.spec):
        longest = model.source.spec.max_positions
        return f"{line}; of {asked:g} GiB no more can be used, by {MOST_SEQUENCES} sequences of {longest} tokens"
    return line


def make_engine(model: Opened, runner: Runner) -> Engine:
    """The engine of rank 0 over its runner."""
    config, spec = model.config, model.source.spec
    cache = runner.cache
    pool = BlockPool(cache.num_blocks, cache.block_size, config.prefix_reuse) if cache else None
    scheduler = Scheduler(
        pool,
        max_batch_tokens=config.max_batch_tokens,
        num_stages=config.pipeline_parallel_size,
        max_sequences=MOST_SEQUENCES,
        max_positions=spec.max_positions,
        window=spec.widest_window,
        short_context=spec.short_context,
    )
    return Engine(scheduler, runner, model.tokenizer, model.end_ids, spec.vocab_size)


def _together(world: World, make: Callable[[], Made]) -> Made:
    """What `make` gives, once it went well on all ranks; RankError on all of them if it did not on one."""
    made, error = None, None
    try:
        with world.loading():
            made = make()
    except (ValueError, OSError, MemoryError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and not _is_memory(problem):
            raise
        error = str(problem) or type(problem).__name__
        if _is_memory(problem):
            error = f"not enough memory: {error.splitlines()[0]}; use more ranks, or less {named('kv_cache_memory')}"
    world.agree(error)
    return made  # type: ignore[return-value]


def _is_memory(problem: Exception) -> bool:
    return isinstance(problem, MemoryError | torch.OutOfMemoryError) or "allocate" in str(problem)


def _build(config: EngineConfig, source: Source, world: World, device: torch.device) -> Decoder:
    dtype = computing_dtype(config, source.spec)
    model = build_stage(source.spec, world.topology, world.tp, dtype, device, config.num_layer_list)
    return model.eval()


def _load(config: EngineConfig, source: Source, world: World, model: Decoder) -> None:
    topology = world.topology
    load_weights(model, source, topology, config.num_layer_list, progress=topology.rank == 0)
