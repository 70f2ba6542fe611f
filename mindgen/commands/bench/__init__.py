"""`mindgen bench`: how fast a model runs here, and how fast this machine could run it."""

from __future__ import annotations

from mindgen.commands.bench.job import BenchJob, prepare
from mindgen.commands.bench.options import BenchConfig
from mindgen.commands.flags import Parser, add_flags
from mindgen.commands.ranks import run_on_ranks
from mindgen.config import EngineConfig
from mindgen.engine.engine import Engine


def main(arguments: list[str]) -> int:
    """Runs the command on this rank, or starts the ranks that it needs; the exit code of the process."""
    return run_on_ranks("bench", arguments, _prepare, _serve)


def parser() -> Parser:
    """The flags of the command, in `mindgen bench --help` and in the documentation's table."""
    made = Parser(
        prog="mindgen bench",
        usage="mindgen bench (--load DIR | --random-weights CONFIG) [options]",
        description="Measures prefill, decode and serving, each beside the bound that this machine sets.",
    )
    add_flags(made, EngineConfig)
    add_flags(made, BenchConfig)
    return made


def _prepare(arguments: list[str], rank: int) -> BenchJob:
    return prepare(parser().parse_args(arguments), arguments, rank)


def _serve(job: BenchJob, engine: Engine) -> int:
    from mindgen.commands.bench.session import serve

    return serve(job, engine)
