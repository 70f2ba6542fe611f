"""`mindgen run_generator`: MindIE's example of the same name, over the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isnan

from mindgen.commands.fitting import check_served
from mindgen.commands.flags import Parser, add_flags, from_flags
from mindgen.commands.latency import Timeline, Watched, run_timed, summarise
from mindgen.commands.mindie.options import GeneratorConfig, engine_config
from mindgen.commands.mindie.plugins import PluginParams, check_plugins, read_plugin_params
from mindgen.commands.mindie.prompts import GeneratorPrompt, gather_prompts, tokenize
from mindgen.commands.mindie.sampling import FLAGS, MindieSampling, read_json_list
from mindgen.commands.mindie.token_files import check_token_ids
from mindgen.commands.ranks import run_on_ranks
from mindgen.config import EngineConfig, named
from mindgen.engine.engine import Engine
from mindgen.engine.request import Output, Request
from mindgen.llm.result import Sample
from mindgen.startup.opened import Opened, TokenizerChoice, open_model, with_tokenizer
from mindgen.weights.flags import add_architecture_flags, given_flags

_HEADINGS = (
    "requests", "batch", "input length", "output length", "time to first token (ms)", "time per token (ms)",
    "total time (ms)", "tokens/s",
)  # fmt: skip
_FLAGS = FLAGS | {"max_new_tokens": "--max_output_length", "kv_cache_memory": "--npu_mem"}


@dataclass(frozen=True)
class GeneratorJob:
    """A checked command line. Only rank 0 has prompts, and a request for each."""

    model: Opened
    options: GeneratorConfig
    prompts: tuple[GeneratorPrompt, ...] = ()
    requests: tuple[Request, ...] = ()


def main(arguments: list[str]) -> int:
    """Runs the command on this rank, or starts the ranks that it needs; the exit code of the process."""
    return run_on_ranks("run_generator", arguments, _prepare, _serve)


def parser() -> Parser:
    """The flags of the command, MindIE's before the engine's own."""
    made = Parser(
        prog="mindgen run_generator",
        usage="mindgen run_generator --model_path DIR [options]",
        description="Answers prompts and measures it. A switch may be followed by true or false.",
    )
    add_flags(made, GeneratorConfig)
    add_flags(made, MindieSampling)
    add_flags(made, EngineConfig, leave_out=("model", "block_size"))
    add_architecture_flags(made)
    return made


def _prepare(arguments: list[str], rank: int) -> GeneratorJob:
    parsed = parser().parse_args(arguments)
    options, sampling = from_flags(GeneratorConfig, parsed), from_flags(MindieSampling, parsed)
    plugins = read_plugin_params(options.plugin_params)
    with _as_given(options):
        config = engine_config(options, parsed, plugins)
    check_plugins(plugins, config)
    model = open_model(config, given_flags(parsed), options.tokenizer)
    if rank:
        return GeneratorJob(model, options)
    model = _with_tokenizer(model, options)
    sampling, notes = _settled(options, sampling, plugins)
    prompts, repeated = _repeated(tokenize(gather_prompts(options), model.tokenizer, options), options)
    requests = tuple(_request(number, prompt, sampling, model, options) for number, prompt in enumerate(prompts))
    return GeneratorJob(replace(model, notes=(*model.notes, *notes, *repeated)), options, tuple(prompts), requests)


@contextmanager
def _as_given(options: GeneratorConfig) -> Iterator[None]:
    """Within it, a ValueError says --npu_mem of the size of the cache, if that flag gave it."""
    try:
        yield
    except ValueError as error:
        message, automatic = str(error), options.npu_mem == -1
        raise ValueError(message if automatic else message.replace(named("kv_cache_memory"), "--npu_mem")) from None


def _with_tokenizer(model: Opened, options: GeneratorConfig) -> Opened:
    """The model with its tokenizer, unless none is wanted, and with the end tokens of the command line, if any."""
    model = with_tokenizer(model, TokenizerChoice(options.tokenizer), needed=options.load_tokenizer)
    if not options.load_tokenizer:
        model = replace(model, tokenizer=None)
    ends = tuple(read_json_list(options.eos_token_id, int, "--eos_token_id"))
    outside = next((end for end in ends if not 0 <= end < model.vocab_size), None)
    if outside is not None:
        raise ValueError(f"--eos_token_id {outside} is not a token id of this model; 0 to {model.vocab_size - 1} are")
    return replace(model, end_ids=ends) if ends else model


def _settled(
    options: GeneratorConfig, sampling: MindieSampling, plugins: PluginParams
) -> tuple[MindieSampling, list[str]]:
    """How to choose tokens, and notes on everything that was given and has no effect."""
    notes = [*options.notes, *plugins.notes]
    if not options.do_post_process:
        sampling, vain = sampling.without_post_process()
        notes += [f"no effect without --do_post_process: {', '.join(vain)}"] if vain else []
    if sampling.idle:
        notes.append(f"no effect beside the other flags: {', '.join(sampling.idle)}")
    return sampling, notes


def _repeated(
    prompts: list[GeneratorPrompt], options: GeneratorConfig
) -> tuple[list[GeneratorPrompt], tuple[str, ...]]:
    """A single prompt fills the batch, where its size is said."""
    count = options.max_batch_size
    if len(prompts) > 1 or count in (None, 1):
        return prompts, ()
    assert count is not None
    return prompts * count, (f"a single prompt is asked --max_batch_size {count} times",)


def _request(
    number: int, prompt: GeneratorPrompt, sampling: MindieSampling, model: Opened, options: GeneratorConfig
) -> Request:
    check_token_ids(prompt.ids, model.vocab_size, f"the prompt {prompt.shown!r}")
    room = options.room(len(prompt.ids), prompt.shown, model.max_positions)
    return Request(number, prompt.ids, sampling.params(room))


def _serve(job: GeneratorJob, engine: Engine) -> int:
    """Rank 0's part; 1 if an answer failed."""
    check_served(engine, _named(job), _FLAGS)
    report, watched = _Report(job), Watched(engine)
    arrivals = [(0.0, request) for request in job.requests]
    timelines = run_timed(watched, arrivals, listen=report.add, most_at_once=job.options.max_batch_size)
    print("\n" + _table(timelines, watched.most_together))
    return 1 if report.failed else 0


def _named(job: GeneratorJob) -> Iterator[tuple[str, Request]]:
    return ((f"the prompt {job.prompts[request.id].shown!r}", request) for request in job.requests)


@dataclass
class _Report:
    """Prints questions and answers in order, each as soon as it and all before it have ended."""

    job: GeneratorJob
    failed: bool = False
    _answers: dict[tuple[int, int], Sample] = field(default_factory=dict)
    _at: int = 0

    def add(self, output: Output) -> None:
        answer = self._answers.setdefault((output.request_id, output.index), Sample())
        answer.add(output)
        self.failed |= output.finish_reason == "error"
        while self._at < len(self.job.requests) and self._ended(self.job.requests[self._at]):
            self._print(self.job.requests[self._at])
            self._at += 1

    def _ended(self, request: Request) -> bool:
        answers = [self._answers.get((request.id, index)) for index in range(request.params.n)]
        return all(answer is not None and answer.finish_reason is not None for answer in answers)

    def _print(self, request: Request) -> None:
        print(f"Question[{request.id}]: {self.job.prompts[request.id].question}")
        for index in range(request.params.n):
            answer = self._answers.pop((request.id, index))
            place = f"[{request.id}]" if request.params.n == 1 else f"[{request.id}][{index}]"
            print(f"Answer{place}: {self._text(answer)}")
            print(f"Generate{place} token num: ({request.id}, {len(answer.token_ids)})", flush=True)
            _print_logprobs(place, answer)
            if answer.message:
                print(f"mindgen: request {request.id}: {answer.message}", file=sys.stderr)

    def _text(self, answer: Sample) -> str:
        return ",".join(map(str, answer.token_ids)) if self.job.model.tokenizer is None else answer.text


def _print_logprobs(place: str, answer: Sample) -> None:
    entries = [entry for entry in answer.logprobs or () if entry.logprob is not None]
    if not entries:
        return
    print(f"CumulativeLogprob{place}: {sum(entry.logprob or 0.0 for entry in entries):.6f}")
    print(f"Logprobs{place}: {[round(entry.logprob or 0.0, 6) for entry in entries]}")
    if entries[0].top:
        tops = [{token: round(logprob, 6) for token, logprob in entry.top} for entry in entries]
        print(f"TopLogprobs{place}: {tops}")


def _table(timelines: list[Timeline], most_together: int) -> str:
    """What the run cost, as a Markdown table of one row; lengths and times are means over the requests, but the output
    length, which is one over their answers. `-` where nothing is known: tokens that came all together have no time
    between them."""
    summary, count = summarise(timelines), len(timelines)
    values = (
        count,
        most_together,
        summary.num_prompt / count,
        summary.answer_length,
        1000 * summary.first_token.mean,
        1000 * summary.gap.mean,
        1000 * summary.seconds,
        summary.tokens_per_second,
    )
    cells = ["-" if isnan(value) else f"{value:.2f}".removesuffix(".00") for value in values]
    widths = [max(len(heading), len(cell)) for heading, cell in zip(_HEADINGS, cells, strict=True)]
    rows = (_HEADINGS, ["-" * (width - 1) + ":" for width in widths], cells)
    return "\n".join(
        f"| {' | '.join(text.rjust(width) for text, width in zip(row, widths, strict=True))} |" for row in rows
    )
