"""`mindgen predict`: PaddleNLP's predictor, from a file of JSON lines to another."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

from mindgen.commands.predict.benchmark import benchmark, check_benchmark, check_room
from mindgen.commands.predict.data import check_data_file
from mindgen.commands.predict.flags import parser, read_flags
from mindgen.commands.predict.options import PredictConfig
from mindgen.commands.predict.output import check_output_file, finished_records
from mindgen.commands.predict.prompts import Prompter, make_prompter
from mindgen.commands.predict.run import predict
from mindgen.commands.predict.survey import Survey, survey
from mindgen.commands.ranks import FAILURE, run_on_ranks
from mindgen.engine.engine import Engine
from mindgen.startup.opened import Opened, TokenizerChoice, open_model, with_tokenizer

__all__ = ["main", "parser"]

_QUICKLY_READ = 32 << 20  # bytes; a larger file is checked when all ranks have met, who would not wait so long


@dataclass(frozen=True)
class PredictJob:
    """A checked command line. Only rank 0 has a prompter, and a survey if there are lines that were read already."""

    model: Opened
    options: PredictConfig
    prompter: Prompter | None = None
    survey: Survey | None = None


def main(arguments: list[str]) -> int:
    """Runs the command on this rank, or starts the ranks that it needs; the exit code of the process."""
    return run_on_ranks("predict", arguments, _prepare, _serve)


def _prepare(arguments: list[str], rank: int) -> PredictJob:
    """Everything that can be refused before weights are read; only rank 0 looks at files."""
    config, options, notes = read_flags(arguments)
    model = open_model(config, {}, options.tokenizer_name_or_path, tuple(notes if rank == 0 else ()))
    if rank != 0:
        return PredictJob(model, options)
    model = with_tokenizer(model, TokenizerChoice(options.tokenizer_name_or_path))
    check_benchmark(options, model.max_positions)
    job = PredictJob(model, options, make_prompter(options, model))
    return _surveyed(job) if options.predicts else job


def _surveyed(job: PredictJob) -> PredictJob:
    options = job.options
    if options.data_file is not None:
        check_data_file(options.data_file)
    check_output_file(options)
    if options.data_file is not None and os.path.getsize(options.data_file) > _QUICKLY_READ:
        return job
    found = _survey(job)
    return replace(job, model=replace(job.model, notes=(*job.model.notes, *found.notes(options))), survey=found)


def _survey(job: PredictJob) -> Survey:
    assert job.prompter is not None
    return survey(job.prompter, finished_records(job.options))


def _serve(job: PredictJob, engine: Engine) -> int:
    """Rank 0's part, with the engine ready. The exit code is 1 if an answer failed."""
    good = True
    if job.options.benchmark:
        check_room(job.options, engine)
    if job.options.predicts:
        good = _predict(job, engine)
    if job.options.benchmark:
        assert job.model.tokenizer is not None
        print(benchmark(job.options, job.model.tokenizer, job.model.vocab_size, engine), flush=True)
    return 0 if good else FAILURE


def _predict(job: PredictJob, engine: Engine) -> bool:
    assert job.prompter is not None
    found = job.survey
    if found is None:
        found = _survey(job)
        print(*found.notes(job.options), sep="\n", file=sys.stderr)
    return predict(job.prompter, found, engine)
