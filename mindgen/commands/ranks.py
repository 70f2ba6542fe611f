"""How a command runs on its ranks: the same program on each, one message from rank 0 when something is wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mindgen.parallel.launch import Ranks, start_ranks
from mindgen.parallel.place import read_place
from mindgen.parallel.topology import Topology

if TYPE_CHECKING:
    import torch

    from mindgen.commands.job import Job
    from mindgen.engine.engine import Engine
    from mindgen.parallel.world import World

Prepare = Callable[[list[str], int], "Job"]
Serve = Callable[["Job", "Engine"], int]
USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def run_on_ranks(command: str, arguments: list[str], prepare: Prepare, serve: Serve) -> int:
    """Prepares the job, gathers or starts its ranks, loads the model and lets rank 0 `serve`. Returns the exit code.

    `prepare` is called with the arguments and the rank and raises ValueError for bad input, before any weight is read;
    without a launcher also before any other rank is started.
    """
    rank = 0
    try:
        place = read_place(os.environ)
        rank = place.rank
        alone = place.world_size == 1
        with _interrupt_exits():
            job, error = _try_prepare(arguments, rank, prepare)
        if alone and error is not None:
            raise ValueError(error)
        with start_ranks(_world_size(job) if alone else None, [command, *arguments]) as ranks:
            return _join(ranks, job, error, serve)
    except BaseException as failure:
        return _exit_code(failure, rank)


@contextmanager
def _interrupt_exits() -> Iterator[None]:
    """While nothing is started, Ctrl-C ends the process at once: some imports would swallow a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _try_prepare(arguments: list[str], rank: int, prepare: Prepare) -> tuple[Job | None, str | None]:
    """The job, or what is wrong, of which other ranks may be waiting to hear; then all slow imports are done."""
    import mindgen.llm  # noqa: F401

    try:
        return prepare(arguments, rank), None
    except (ValueError, OSError) as error:
        return None, str(error)


def _world_size(job: Job | None) -> int:
    assert job is not None
    return (job.config.tensor_parallel_size or 1) * job.config.pipeline_parallel_size


def _join(ranks: Ranks, job: Job | None, error: str | None, serve: Serve) -> int:
    """One rank's life: connect, agree that all is well, load, and serve or follow."""
    from mindgen.device import pick_device
    from mindgen.parallel.threads import limit_threads
    from mindgen.parallel.world import connect

    limit_threads(ranks.place.local_world_size)
    topology, device = Topology(ranks.place.rank, ranks.place.world_size, 1), None
    if job is not None:
        try:
            job, topology = _with_all_ranks(job, ranks)
            device = pick_device(job.config.device, ranks.place.local_rank)
        except ValueError as problem:
            error = str(problem)
    if device is None:
        device = pick_device("cpu", 0)
        topology = Topology(ranks.place.rank, ranks.place.world_size, 1)
    with connect(topology, device, ranks=ranks) as world:
        world.agree(error)
        assert job is not None
        return _work(job, world, device, ranks.place.local_world_size, serve)


def _with_all_ranks(job: Job, ranks: Ranks) -> tuple[Job, Topology]:
    """The job with its tensor parallel size settled: all ranks that pipeline parallelism leaves it."""
    from mindgen.weights.rows import check_divides

    world_size, pp = ranks.place.world_size, job.config.pipeline_parallel_size
    tp = job.config.tensor_parallel_size or max(1, world_size // pp)
    if tp * pp != world_size:
        raise ValueError(
            f"tensor parallel size {tp} x pipeline parallel size {pp} is {tp * pp} ranks, but {world_size} "
            "were started; set --tensor-model-parallel-size, --pipeline-model-parallel-size or --nproc_per_node"
        )
    check_divides(job.source.spec, tp)
    return replace(job, config=replace(job.config, tensor_parallel_size=tp)), Topology(ranks.place.rank, tp, pp)


def _work(job: Job, world: World, device: torch.device, local_ranks: int, serve: Serve) -> int:
    from mindgen.llm import describe_cache, make_engine, make_runner

    world.same("the model or its configuration", f"{hash_of(job.source.spec, job.config)}")
    runner = make_runner(job.config, job.source, world, device, local_ranks)
    if world.topology.rank:
        runner.follow()
        return 0
    for note in (*job.notes, describe_cache(runner)):
        print(note, file=sys.stderr)
    engine = make_engine(job.config, job.source.spec, runner, job.tokenizer, job.end_ids)
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
