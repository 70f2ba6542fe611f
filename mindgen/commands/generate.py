"""`mindgen generate`: prompts in, text out, over any number of ranks."""

from __future__ import annotations

from mindgen.commands.answers import answer
from mindgen.commands.chat import chat
from mindgen.commands.fitting import check_served
from mindgen.commands.flags import Parser, add_flags, from_flags
from mindgen.commands.job import Job, open_job
from mindgen.commands.legacy import add_legacy_flags, apply_legacy_flags
from mindgen.commands.options import GenerateConfig
from mindgen.commands.ranks import FAILURE, run_on_ranks
from mindgen.commands.tasks import find_tasks, sampling_flags
from mindgen.config import EngineConfig
from mindgen.engine.engine import Engine


def main(arguments: list[str]) -> int:
    """Runs the command on this rank, or starts the ranks that it needs; the exit code of the process."""
    return run_on_ranks("generate", arguments, _prepare, _serve)


def parser() -> Parser:
    """The flags of the command, in `mindgen generate --help` and in the documentation's table."""
    made = Parser(
        prog="mindgen generate",
        usage="mindgen generate --load DIR [options]",
        description="Generates text from a Hugging Face folder or a Megatron directory.",
    )
    add_flags(made, EngineConfig)
    add_flags(made, GenerateConfig)
    add_legacy_flags(made)
    return made


def _prepare(arguments: list[str], rank: int) -> Job:
    """Everything that can be refused before weights are read; only rank 0 looks at prompts."""
    parsed = parser().parse_args(arguments)
    notes = apply_legacy_flags(parsed)
    config, options = from_flags(EngineConfig, parsed), from_flags(GenerateConfig, parsed)
    return open_job(config, options, parsed, notes if rank == 0 else [], rank)


def _serve(job: Job, engine: Engine) -> int:
    """Rank 0's part, with the engine ready: the tasks in turn. The exit code is 1 if an answer failed."""
    tasks = find_tasks(job.options.task)
    names = [f"the prompt {prompt.shown!r}" for prompt in job.prompts]
    asked = (pair for task in tasks if not task.chat for pair in zip(names, job.requests(task), strict=True))
    check_served(engine, asked, sampling_flags(job.options))
    good = True
    for number, task in enumerate(tasks):
        good &= chat(job, task, engine) if task.chat else answer(job, task, engine, first=number == 0)
    return 0 if good else FAILURE
