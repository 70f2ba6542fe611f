"""`mindgen engine_test`: requests of token ids from a CSV file, and what they cost in time."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from math import isnan
from pathlib import Path

from mindgen.commands.fitting import check_served
from mindgen.commands.flags import Parser, add_flags, from_flags
from mindgen.commands.latency import Percentiles, Timeline, run_timed, summarise
from mindgen.commands.mindie.sampling import FLAGS, MindieSampling
from mindgen.commands.mindie.token_files import check_token_ids, read_token_file
from mindgen.commands.ranks import run_on_ranks
from mindgen.config import EngineConfig, option
from mindgen.engine.engine import Engine
from mindgen.engine.request import Output, Request, SamplingParams
from mindgen.startup.opened import Opened, TokenizerChoice, open_model, with_tokenizer
from mindgen.weights.flags import add_architecture_flags, given_flags

_WARM_UP_TOKENS = 2  # a prompt and one decode: both kinds of step have run once
_PARTS = (10, 20, 30, 40, 50, 60, 80, 90, 95, 99)


@dataclass(frozen=True)
class EngineTestConfig:
    """Which requests to serve, and what to write."""

    dataset_path: str | None = option(None, "the same as the file given without a flag", "--dataset_path")
    tokenizer: str | None = option(
        None, "where the tokenizer is, for end tokens and stop strings (default: with the model)",
        "--tokenizer-name-or-path",
    )  # fmt: skip
    max_new_tokens: int = option(512, "the most tokens of an answer", "--max_new_tokens")
    max_seq_len: int | None = option(
        None, "the most tokens of prompt and answer together (default: the model's)", "--max_seq_len"
    )
    max_batch_size: int | None = option(
        None, "requests at once (default: as many as the cache holds)", "--max_batch_size"
    )
    warm_up: int = option(10, "requests that run before the clock does", "--warm_up")
    load_all_data: bool = option(False, "no warm-up", "--load_all_data", style="truth")

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("max_seq_len", 2), ("max_batch_size", 1), ("warm_up", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name} is {value}; it must be at least {low}")

    def params(self, sampling: MindieSampling, length: int, max_positions: int, where: str) -> SamplingParams:
        """For a prompt of `length` tokens; ValueError, which says `where` it stands, if there is no room to answer."""
        most = min(max_positions, self.max_seq_len or max_positions)
        if length >= most:
            raise ValueError(
                f"{where} has {length} tokens, and prompt and answer together may have {most}: no room for an answer"
            )
        return sampling.params(min(self.max_new_tokens, most - length))


@dataclass(frozen=True)
class EngineTestJob:
    """A checked command line. Only rank 0 has requests. record: where their tokens are to be written."""

    model: Opened
    options: EngineTestConfig
    requests: tuple[Request, ...] = ()
    record: Path | None = None


def main(arguments: list[str]) -> int:
    """Runs the command on this rank, or starts the ranks that it needs; the exit code of the process."""
    return run_on_ranks("engine_test", arguments, _prepare, _serve)


def parser() -> Parser:
    """The flags of the command."""
    made = Parser(
        prog="mindgen engine_test",
        usage="mindgen engine_test token_input.csv --load DIR [options]",
        description="Serves the requests of a file and prints their latencies. Tokens are drawn, with a fixed seed, "
        "unless --do_sample false is given.",
    )
    made.add_argument("dataset", nargs="?", help="a request a line, as token ids with commas between them")
    made.add_argument(
        "--record_output", nargs="?", const="token_output.csv", metavar="FILE",
        help="write the tokens of each answer, a line for each request in order (default file: token_output.csv)",
    )  # fmt: skip
    made.add_argument("--config_path", metavar="FILE", help="refused: the model is named with --load")
    add_flags(made, EngineTestConfig)
    add_flags(made, MindieSampling)
    add_flags(made, EngineConfig)
    add_architecture_flags(made)
    return made


def _prepare(arguments: list[str], rank: int) -> EngineTestJob:
    parsed = parser().parse_args(arguments)
    if parsed.config_path is not None:
        raise ValueError("--config_path is not supported: name the model with --load, and the rest with flags")
    options, sampling = from_flags(EngineTestConfig, parsed), from_flags(MindieSampling, parsed)
    if sampling.do_sample is None:
        sampling = replace(sampling, do_sample=True)
    model = open_model(from_flags(EngineConfig, parsed), given_flags(parsed), options.tokenizer)
    if rank:
        return EngineTestJob(model, options)
    dataset = _dataset(parsed.dataset, options.dataset_path)
    model = with_tokenizer(model, TokenizerChoice(options.tokenizer), needed=sampling.stop_strings is not None)
    idle = (f"no effect beside the other flags: {', '.join(sampling.idle)}",) if sampling.idle else ()
    record = None if parsed.record_output is None else _writable(Path(parsed.record_output), Path(dataset))
    requests = tuple(_requests(dataset, options, sampling, model))
    return EngineTestJob(replace(model, notes=(*model.notes, *idle)), options, requests, record)


def _dataset(given: str | None, flagged: str | None) -> str:
    if given is None and flagged is None:
        raise ValueError("no requests given; name a file with a line of token ids for each, such as token_input.csv")
    if given is not None and flagged is not None:
        raise ValueError(f"{given} and --dataset_path {flagged} both name the requests; leave one out")
    return given or flagged or ""


def _requests(name: str, options: EngineTestConfig, sampling: MindieSampling, model: Opened) -> Iterable[Request]:
    for number, ids in enumerate(read_token_file(name)):
        where = f"{name}, line {number + 1}"
        check_token_ids(ids, model.vocab_size, where)
        yield Request(number, ids, options.params(sampling, len(ids), model.max_positions, where))


def _writable(path: Path, dataset: Path) -> Path:
    """Where the file is to be, behind all links. Refuses one that could not be put there, and the one that is read."""
    target = Path(os.path.realpath(path))  # which takes links that lead to themselves
    if target == Path(os.path.realpath(dataset)):
        raise ValueError(f"--record_output {path} is the file of the requests; name another one")
    if target.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"--record_output {path} is not a regular file, and would be replaced; name another one")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(f"--record_output {path} cannot be written; name a file in a folder that is there")
    return target


def _serve(job: EngineTestJob, engine: Engine) -> int:
    """Rank 0's part; 1 if an answer failed."""
    asked = ((f"line {number}", request) for number, request in enumerate(job.requests, 1))
    check_served(engine, asked, FLAGS | {"max_new_tokens": "--max_new_tokens"})
    _warm_up(job, engine)
    tokens: list[list[int]] = [[] for _ in job.requests]
    failures: list[str] = []

    def listen(output: Output) -> None:
        if output.index == 0:
            tokens[output.request_id] += output.token_ids
        if output.finish_reason == "error":
            failures.append(f"mindgen: line {output.request_id + 1}: {output.message}")

    arrivals = [(0.0, request) for request in job.requests]
    try:
        timelines = run_timed(engine, arrivals, listen=listen, most_at_once=job.options.max_batch_size)
    except KeyboardInterrupt:
        if job.record is not None:
            print(f"mindgen: interrupted; nothing was written to {job.record}", file=sys.stderr)
        raise
    for line in failures:
        print(line, file=sys.stderr)
    if job.record is not None:
        write_token_file(job.record, tokens)
    for name, value in figures(timelines, job.model).items():
        print(f"{name}:{value}")
    return 1 if failures else 0


def _warm_up(job: EngineTestJob, engine: Engine) -> None:
    """Serves requests of the same lengths with other tokens: the same ones would be found in the cache afterwards."""
    count = 0 if job.options.load_all_data else job.options.warm_up
    for request in job.requests[:count]:
        other = tuple((token + 1) % job.model.vocab_size for token in request.prompt)
        params = replace(request.params, max_new_tokens=min(_WARM_UP_TOKENS, request.params.max_new_tokens))
        engine.submit(Request(request.id, other, params))
    while engine.has_work:
        engine.step()


def write_token_file(path: Path, rows: Iterable[Iterable[int]]) -> None:
    """Writes a line of token ids for each row, ended by CRLF. ValueError if it cannot.

    The file appears whole, with the permissions of the one that it replaces, or those of any new file.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("x", newline="") as file:
            try:
                if path.exists():
                    os.chmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                file.writelines(",".join(map(str, row)) + "\r\n" for row in rows)
                file.close()
                beside.replace(path)
            except BaseException:
                beside.unlink()
                raise
    except OSError as error:
        raise ValueError(f"--record_output {path} cannot be written: {error.strerror}") from None


def figures(timelines: list[Timeline], model: Opened) -> dict[str, str]:
    """MindIE's figures by its names, in its order. Milliseconds where nothing else is said, `-` where none came."""
    summary, count = summarise(timelines), len(timelines)
    last = Percentiles.of(line.gaps[-1] for line in timelines if line.gaps)
    first = summary.first_token
    tp = model.config.tensor_parallel_size or 1
    return {
        "model_name": Path(model.config.model).resolve().name,
        "server_count": "1",
        "tp": str(tp),
        "pp": str(model.config.pipeline_parallel_size),
        "request_num": str(count),
        "average_input_length": f"{summary.num_prompt / count:.2f}",
        "average_output_length": f"{summary.answer_length:.2f}",
        "latency_for_all": _ms(summary.seconds),
        "latency_for_per_infer": _ms(summary.latency.mean),
        "lpct": _ms(sum(first.values) / summary.num_prompt),
        "lpot": _ms(summary.gap.mean),
        **{f"p{part}_lpot": _ms(summary.gap.at(part / 100)) for part in _PARTS},
        "pmax_lpot": _ms(summary.gap.largest),
        "average_first_token": _ms(first.mean),
        "p99_first_token": _ms(first.p99),
        "max_first_token": _ms(first.largest),
        "average_last_token": _ms(last.mean),
        "p99_last_token": _ms(last.p99),
        "max_last_token": _ms(last.largest),
        "max_decode_time": _ms(summary.gap.largest),
        "qps": f"{summary.requests_per_second:.4f} /s",
        "qpsPerNpu": f"{summary.requests_per_second / tp:.4f} /s",
        "generate speed": f"{summary.tokens_per_second:.4f} tokens/s",
        "current time": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }


def _ms(seconds: float) -> str:
    return "-" if isnan(seconds) else f"{1000 * seconds:.4f} ms"
