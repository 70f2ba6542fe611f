"""What one benchmark is asked to do, checked before any weight is read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from mindgen.commands.bench.bounds import count_work
from mindgen.commands.bench.options import BenchConfig
from mindgen.commands.bench.random_weights import RandomSource
from mindgen.commands.bench.rival_config import find_config
from mindgen.commands.bench.shapes import find_shape, shape_file
from mindgen.commands.bench.workload import Words
from mindgen.commands.flags import from_flags
from mindgen.config import PRECISIONS, EngineConfig
from mindgen.parallel.topology import split_layers
from mindgen.startup.cache_size import MOST_SEQUENCES
from mindgen.startup.opened import Opened, TokenizerChoice, open_model, with_tokenizer
from mindgen.startup.ready import computing_dtype
from mindgen.weights.families.family import Config
from mindgen.weights.rows import check_divides


@dataclass(frozen=True)
class BenchJob:
    """A checked command line. Only rank 0 has words, and the `config.json` of the rival if there is one."""

    model: Opened
    options: BenchConfig
    arguments: tuple[str, ...]
    words: Words | None = None
    rival: Config | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element of weights and cache."""
        return computing_dtype(self.model.config, self.model.source.spec).itemsize

    @property
    def num_slots(self) -> int:
        """Tokens of cache with which all requests start at once: their blocks, and one more each.

        The scheduler admits nobody before those who run could have one more block each.
        """
        size = self.model.config.block_size
        return self.options.most_at_once * (-(-self.options.longest // size) + 1) * size


def prepare(parsed: argparse.Namespace, arguments: list[str], rank: int) -> BenchJob:
    """Opens the model's headers, or invents them. ValueError for all that is wrong."""
    options = from_flags(BenchConfig, parsed)
    model = _random_model(options, parsed) if options.random_weights is not None else open_model(_config(parsed))
    job = BenchJob(model, options, tuple(arguments))
    if not model.config.use_kv_cache:
        raise ValueError("--no-use-kv-cache computes every token anew, for which bench knows no bounds; leave it out")
    if options.longest > model.max_positions:
        raise ValueError(
            f"--input-len and --output-len come to {options.longest} tokens, "
            f"but the model's context is {model.max_positions}"
        )
    if not options.is_serving and options.most_at_once > MOST_SEQUENCES:
        raise ValueError(
            f"--batch-size is {options.most_at_once}, but at most {MOST_SEQUENCES} sequences run together; lower it"
        )
    if options.vs is not None:
        job = replace(job, model=_with_small_cache(job))
    if rank:
        return job
    options.check_files()
    if options.vs is not None:
        job = replace(job, rival=find_config(model.source, _shape_file(options)))
    return _with_words(job)


def _shape_file(options: BenchConfig) -> Path | None:
    return None if options.random_weights is None else shape_file(options.random_weights)


def _config(parsed: argparse.Namespace) -> EngineConfig:
    if not parsed.model:
        raise ValueError("no model given; name a checkpoint with --load, or a shape with --random-weights")
    return from_flags(EngineConfig, parsed)


def _random_model(options: BenchConfig, parsed: argparse.Namespace) -> Opened:
    """A model that is nowhere: the precision is --dtype, or what its config.json says, or bf16."""
    if parsed.model:
        raise ValueError(f"--random-weights stands in for a model; leave out --load {parsed.model}")
    name = f"{options.random_weights} with random weights"
    config = from_flags(EngineConfig, parsed, model=name)
    spec = find_shape(str(options.random_weights), "bfloat16")
    if config.dtype is not None:
        spec = replace(spec, dtype=PRECISIONS[config.dtype])
    if config.tensor_parallel_size is not None:
        check_divides(spec, config.tensor_parallel_size)
    split_layers(spec.num_layers, config.pipeline_parallel_size, config.num_layer_list)
    return Opened(config, RandomSource(spec, name, options.seed))


def _with_small_cache(job: BenchJob) -> Opened:
    """Leaves memory for a second copy of the model: unless it is given, the cache is as large as the requests need."""
    config = job.model.config
    if config.kv_cache_memory is not None or config.kv_cache_fraction is not None:
        return job.model
    work = count_work(job.model.source.spec, job.itemsize, config.tensor_parallel_size or 1)
    gib = (job.num_slots + config.block_size) * work.cache_bytes / 2**30
    return replace(job.model, config=replace(config, kv_cache_memory=gib))


def _with_words(job: BenchJob) -> BenchJob:
    options, model = job.options, job.model
    text: tuple[int, ...] = ()
    if options.text_file is not None:
        if options.random_weights is not None:
            raise ValueError("--text-file needs a tokenizer, which random weights have not; leave out one of them")
        model = with_tokenizer(model, TokenizerChoice())
        assert model.tokenizer is not None
        text = tuple(model.tokenizer.encode(_read(options.text_file)))
    return replace(job, model=model, words=Words(model.vocab_size, options.seed, text))


def _read(name: str) -> str:
    if Path(name).exists() and not Path(name).is_file():
        raise ValueError(f"--text-file {name} is not a regular file")
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text-file {name} cannot be read: {error}") from None
    if not text.strip():
        raise ValueError(f"--text-file {name} holds no text")
    return text
