"""How a command runs on its ranks: the same program on each, one message from rank 0 when something is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from mindgen.parallel.interrupt import INTERRUPTED, interrupt_exits
from mindgen.parallel.launch import Ranks, start_ranks
from mindgen.parallel.place import read_place
from mindgen.startup.ranks import ready_rank, world_size

if TYPE_CHECKING:
    from mindgen.engine.engine import Engine
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
    return world_size(job.model.config)


def _join(ranks: Ranks, job: J | None, error: str | None, serve: Serve[J]) -> int:
    """One rank's life: connect, agree that all is well, load, and serve or follow."""
    from mindgen.startup.ready import describe, make_engine

    with ready_rank(ranks, None if job is None else job.model, error) as (model, runner):
        if ranks.place.rank:
            runner.follow()
            return 0
        assert job is not None
        for note in (*model.notes, *describe(model, runner)):
            print(note, file=sys.stderr)
        engine = make_engine(model, runner)
        code = serve(job, engine)
        engine.close()
        if runner.graphs is not None:
            print(f"graphs: {runner.graphs.num_replayed} steps were replayed", file=sys.stderr)
        return code


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
