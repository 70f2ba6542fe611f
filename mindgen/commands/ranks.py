"""How a command runs on its ranks: the same program on each, one message from rank 0 when something is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from mindgen.parallel.interrupt import INTERRUPTED, interrupt_exits
from mindgen.parallel.launch import Ranks, start_ranks
from mindgen.parallel.place import read_place
from mindgen.parallel.topology import Topology

if TYPE_CHECKING:
    import torch

    from mindgen.engine.engine import Engine
    from mindgen.parallel.world import World
    from mindgen.startup.opened import Opened


class HasModel(Protocol):
    """What every command's job has, whatever else it holds."""

    @property
    def model(self) -> Opened: ...


J = TypeVar("J", bound=HasModel)
Prepare = Callable[[list[str], int], J]
Serve = Callable[[J, "Engine"], int]
USER_ERROR, FAILURE = 2, 1


def run_on_ranks(command: str, arguments: list[str], prepare: Prepare[J], serve: Serve[J]) -> int:
    """Prepares the job, gathers or starts its ranks, loads the model and lets rank 0 `serve`. Returns the exit code.

    `prepare` is called with the arguments and the rank and raises ValueError for bad input, before any weight is read;
    without a launcher also before any other rank is started.
    """
    rank = 0
    try:
        place = read_place(os.environ)
        rank = place.rank
        alone = place.world_size == 1
        with interrupt_exits():
            job, error = _try_prepare(arguments, rank, prepare)
        if alone and error is not None:
            raise ValueError(error)
        with start_ranks(_world_size(job) if alone else None, [command, *arguments]) as ranks:
            return _join(ranks, job, error, serve)
    except BaseException as failure:
        return _exit_code(failure, rank)


def _try_prepare(arguments: list[str], rank: int, prepare: Prepare[J]) -> tuple[J | None, str | None]:
    """The job, or what is wrong, of which other ranks may be waiting to hear; then all slow imports are done."""
    import mindgen.startup.ready  # noqa: F401

    try:
        return prepare(arguments, rank), None
    except (ValueError, OSError) as error:
        return None, str(error)


def _world_size(job: HasModel | None) -> int:
    assert job is not None
    config = job.model.config
    return (config.tensor_parallel_size or 1) * config.pipeline_parallel_size


def _join(ranks: Ranks, job: J | None, error: str | None, serve: Serve[J]) -> int:
    """One rank's life: connect, agree that all is well, load, and serve or follow."""
    from mindgen.device import pick_device
    from mindgen.parallel.threads import limit_threads
    from mindgen.parallel.world import connect

    limit_threads(ranks.place.local_world_size)
    model, device, topology = None, None, Topology(ranks.place.rank, ranks.place.world_size, 1)
    if job is not None:
        try:
            model, topology = _with_all_ranks(job.model, ranks)
            device = pick_device(model.config.device, ranks.place.local_rank)
        except ValueError as problem:
            error = str(problem)
    if device is None:
        device = pick_device("cpu", 0)
        topology = Topology(ranks.place.rank, ranks.place.world_size, 1)
    with connect(topology, device, ranks=ranks) as world:
        world.agree(error)
        assert job is not None and model is not None
        engine = _load(model, world, device, ranks.place.local_world_size)
        return 0 if engine is None else _serve(job, engine, serve)


def _with_all_ranks(model: Opened, ranks: Ranks) -> tuple[Opened, Topology]:
    """The model with its tensor parallel size settled: all ranks that pipeline parallelism leaves it."""
    from mindgen.weights.rows import check_divides

    world_size, pp = ranks.place.world_size, model.config.pipeline_parallel_size
    tp = model.config.tensor_parallel_size or max(1, world_size // pp)
    if tp * pp != world_size:
        raise ValueError(
            f"tensor parallel size {tp} x pipeline parallel size {pp} is {tp * pp} ranks, but {world_size} "
            "were started; set --tensor-model-parallel-size, --pipeline-model-parallel-size or --nproc_per_node"
        )
    check_divides(model.source.spec, tp)
    return replace(model, config=replace(model.config, tensor_parallel_size=tp)), Topology(ranks.place.rank, tp, pp)


def _load(model: Opened, world: World, device: torch.device, local_ranks: int) -> Engine | None:
    """The engine on rank 0; other ranks follow it, and return None when it has stopped."""
    from mindgen.startup.ready import describe_cache, make_engine, make_runner

    world.same("the model or its configuration", hash_of(model.source.spec, model.config))
    runner = make_runner(model.config, model.source, world, device, local_ranks)
    if world.topology.rank:
        runner.follow()
        return None
    for note in (*model.notes, describe_cache(runner)):
        print(note, file=sys.stderr)
    return make_engine(model, runner)


def _serve(job: J, engine: Engine, serve: Serve[J]) -> int:
    code = serve(job, engine)
    engine.close()
    return code


def hash_of(*values: object) -> str:
    """A short digest of values that print what they are."""
    from hashlib import sha256

    return sha256(repr(values).encode()).hexdigest()[:16]


def _exit_code(failure: BaseException, rank: int) -> int:
    """What the process ends with, and the one line that says why: on rank 0, or where only this rank knows."""
    from mindgen.parallel.group import PeerLost
    from mindgen.parallel.rendezvous import RendezvousError
    from mindgen.parallel.world import RankError

    if isinstance(failure, SystemExit):
        return failure.code if isinstance(failure.code, int) else FAILURE
    if isinstance(failure, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(failure, BrokenPipeError):
        return FAILURE
    if isinstance(failure, OSError) and failure.filename is None:
        failure = OSError(f"input or output failed: {failure.strerror}")
    if isinstance(failure, RankError | ValueError | OSError):
        _say(str(failure), rank == 0)
        return USER_ERROR
    if isinstance(failure, PeerLost | RendezvousError):
        _say(str(failure), True)
        return FAILURE
    raise failure


def _say(text: str, speaks: bool) -> None:
    if speaks:
        sys.stdout.flush()
        print(f"mindgen: {text}", file=sys.stderr)
