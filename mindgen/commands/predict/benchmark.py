"""`predict --benchmark`: PaddleNLP's throughput line, with the lengths really forced."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mindgen.commands.latency import Percentiles, Timeline, run_timed, summarise
from mindgen.commands.predict.options import PredictConfig
from mindgen.engine.engine import Engine
from mindgen.engine.fits import blocks_at_once
from mindgen.engine.request import Request
from mindgen.engine.scheduler import Scheduler
from mindgen.startup.cache_size import MOST_SEQUENCES
from mindgen.text.tokenizer import Tokenizer

_TEXT = "hello world, how are you?"  # PaddleNLP's


def check_benchmark(options: PredictConfig, max_positions: int) -> None:
    """Refuses lengths that the model cannot take, and a batch that would not run at once. ValueError names them."""
    if not options.benchmark:
        return
    wanted, most = options.src_length + options.max_length, options.total(max_positions)
    if wanted > most:
        raise ValueError(
            f"--benchmark needs --src_length {options.src_length} and --max_length {options.max_length} together, "
            f"{wanted} tokens, but prompt and answer have {most}; lower one of them"
        )
    width = options.params(1).num_beams
    if options.batch_size * width > MOST_SEQUENCES:
        beams = f" in {width} beams" if width > 1 else ""
        raise ValueError(
            f"--benchmark: --batch_size is {options.batch_size}{beams}, but at most {MOST_SEQUENCES} sequences run "
            "together; lower it"
        )


def check_room(options: PredictConfig, engine: Engine) -> None:
    """Every prompt of a batch must find room at once, or its figures would be those of a queue; else ValueError."""
    scheduler = engine.scheduler
    pool, params = scheduler.pool, options.params(options.max_length, forced=True)
    if pool is None:
        _check_step(options, params.num_beams, scheduler)
        return
    request = Request(0, (0,) * options.src_length, params)
    need = blocks_at_once(request, options.batch_size, pool, scheduler.sight)
    if need > pool.num_blocks:
        raise ValueError(
            f"--benchmark: --batch_size {options.batch_size} takes {need} blocks of {pool.block_size} tokens at once, "
            f"but the cache has {pool.num_blocks}; raise --kv-cache-memory, or lower --batch_size, --src_length or "
            "--max_length"
        )


def _check_step(options: PredictConfig, num_beams: int, scheduler: Scheduler) -> None:
    """Without a cache all tokens of a sequence are in each of its steps; one request may be in a step alone, however
    long it is."""
    together = -(-options.batch_size // scheduler.num_stages)
    need = together * num_beams * (options.src_length + options.max_length - 1)
    if together > 1 and need > scheduler.max_batch_tokens:
        raise ValueError(
            f"--benchmark: --batch_size {options.batch_size} takes up to {need} tokens a step without a cache, but "
            f"--max-batch-tokens is {scheduler.max_batch_tokens}; raise it, or lower --batch_size, --src_length or "
            "--max_length"
        )


def benchmark(options: PredictConfig, tokenizer: Tokenizer, vocab_size: int, engine: Engine) -> str:
    """Runs the warm-up and then the timed batches, one after another; the report.

    Every prompt has exactly src_length tokens and every answer exactly max_length: end-of-text tokens are ignored. No
    two prompts begin alike, so that none profits from what the cache knows of another.
    """
    batches = [_batch(options, tokenizer, vocab_size, number) for number in range(_num_batches(options))]
    for batch in batches[: options.benchmark_warmup]:
        _run(engine, batch)
    started = time.perf_counter()
    timelines = [line for batch in batches[options.benchmark_warmup :] for line in _run(engine, batch)]
    return report(options, timelines, time.perf_counter() - started)


def report(options: PredictConfig, timelines: Sequence[Timeline], seconds: float) -> str:
    """PaddleNLP's three lines, and what it does not measure: the time to the first token and between tokens.

    seconds: for all timed batches. Raises ValueError if a prompt or an answer had another length than was forced.
    """
    found = summarise(timelines)
    failed = [line for line in timelines if (line.num_prompt, line.num_new) != (options.src_length, options.max_length)]
    if failed:
        raise ValueError(
            f"--benchmark: {len(failed)} of {len(timelines)} answers did not reach --max_length {options.max_length}: "
            f"{', '.join(sorted({reason for line in failed for reason in line.reasons.values()}))}"
        )
    lines = [
        f"Avg Elapse time is: {seconds / options.benchmark_repeats}",
        f"Output tokens is: {found.num_new}",
        f"Input length is: {options.src_length}, Output length is: {options.max_length}, bs is: {options.batch_size}, "
        f"IPS: {found.num_new / seconds:.3f} tokens/s, QPS: {found.num_requests / seconds:.3f} requests/s.",
        _milliseconds("Time to first token", found.first_token),
    ]
    return "\n".join([*lines, _milliseconds("Time between tokens", found.gap)] if found.gap.values else lines)


def _num_batches(options: PredictConfig) -> int:
    return options.benchmark_warmup + options.benchmark_repeats


def _batch(options: PredictConfig, tokenizer: Tokenizer, vocab_size: int, number: int) -> list[Request]:
    text = tokenizer.encode(_TEXT, add_special_tokens=False)
    params = options.params(options.max_length, forced=True)
    first = number * options.batch_size
    return [
        Request(index, _prompt(text, index, vocab_size, options.src_length), params)
        for index in range(first, first + options.batch_size)
    ]


def _prompt(text: list[int], index: int, vocab_size: int, length: int) -> tuple[int, ...]:
    """The text over and over, behind its number, written in tokens."""
    number = (index % vocab_size, index // vocab_size % vocab_size)
    repeated = text * (length // len(text) + 1)
    return (*number, *repeated)[:length]


def _run(engine: Engine, batch: list[Request]) -> list[Timeline]:
    return run_timed(engine, [(0.0, request) for request in batch])


def _milliseconds(title: str, values: Percentiles) -> str:
    p50, p90, p99 = (1000 * value for value in (values.p50, values.p90, values.p99))
    return f"{title}: p50 {p50:.2f} ms, p90 {p90:.2f} ms, p99 {p99:.2f} ms"
