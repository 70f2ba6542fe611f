"""What one command line asks for, checked as far as possible before any weight is read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindgen.commands.options import GenerateConfig
from mindgen.commands.prompts import Prompt, gather_prompts, tokenize
from mindgen.commands.tasks import Task, find_tasks
from mindgen.config import EngineConfig
from mindgen.engine.request import Request
from mindgen.parallel.topology import split_layers
from mindgen.weights.rows import check_divides
from mindgen.weights.source import Source

if TYPE_CHECKING:
    from mindgen.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """A checked command line. Only rank 0 has a tokenizer and prompts.

    notes: lines for the user, printed once. end_ids: tokens that end a text.
    """

    config: EngineConfig
    options: GenerateConfig
    source: Source
    tokenizer: Tokenizer | None = None
    prompts: tuple[Prompt, ...] = ()
    end_ids: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)

    def room(self, prompt: Prompt) -> int:
        """How many tokens may follow a prompt; ValueError with the numbers if none."""
        return room(len(prompt.ids), self.options, self.source.spec.max_positions, prompt.shown)

    def requests(self, task: Task) -> list[Request]:
        """One request for each prompt, numbered in order."""
        return [
            Request(number, prompt.ids, task.params(self.options, self.room(prompt)))
            for number, prompt in enumerate(self.prompts)
        ]


def room(length: int, options: GenerateConfig, max_positions: int, shown: str) -> int:
    """New tokens that fit after `length` ones: the smallest of the three limits. ValueError if there is none."""
    limits = {"the model's max_positions": max_positions - length, "--max-new-tokens": options.max_new_tokens}
    if options.max_length is not None:
        limits["--max-length"] = options.max_length - length
    name, smallest = min(limits.items(), key=lambda item: item[1])
    if smallest < 1:
        limit = max_positions if name.startswith("the") else options.max_length
        raise ValueError(
            f"the prompt {shown!r} has {length} tokens, and {name} is {limit}: "
            "no room for an answer; shorten the prompt"
        )
    return smallest


def open_job(
    config: EngineConfig, options: GenerateConfig, parsed: argparse.Namespace, notes: list[str], rank: int
) -> Job:
    """Opens the checkpoint's headers and, on rank 0, tokenizer and prompts. ValueError for all that is wrong."""
    from mindgen.weights.flags import given_flags
    from mindgen.weights.open import open_source

    beside = Path(options.tokenizer_name_or_path) if options.tokenizer_name_or_path else None
    source = open_source(Path(config.model), given_flags(parsed), beside)
    if config.tensor_parallel_size is not None:
        check_divides(source.spec, config.tensor_parallel_size)
    split_layers(source.spec.num_layers, config.pipeline_parallel_size, config.num_layer_list)
    job = Job(config, options, source, notes=notes)
    return _with_prompts(job) if rank == 0 else job


def _with_prompts(job: Job) -> Job:
    tasks = find_tasks(job.options.task)
    prompts = gather_prompts(job.options) if any(not task.chat for task in tasks) else []
    job = _with_tokenizer(job, needed=not prompts or any(prompt.text is not None for prompt in prompts))
    tokenized = tokenize(prompts, job.tokenizer, job.source.spec.vocab_size, job.options)
    job = replace(job, prompts=tuple(tokenized), notes=job.notes + _unused_options(job.options, tasks))
    for task in tasks:
        job.requests(task)
        task.params(job.options, 1)  # also for chat, whose prompts are not known yet
        if task.chat and job.tokenizer is None:
            raise ValueError("--task chat needs a tokenizer; name one with --tokenizer-name-or-path")
    _check_output(job.options.output_file)
    _check_comparison(job)
    return job


def _unused_options(options: GenerateConfig, tasks: list[Task]) -> list[str]:
    """Lines on options that none of the tasks looks at."""
    plain, notes = GenerateConfig(), []
    kinds = {
        "greedy_search_with_sampling": (("temperature", "top_k", "top_p"), any(task.sampling for task in tasks)),
        "beam_search": (("num_beams", "length_penalty"), any(task.beams for task in tasks)),
    }
    for task, (names, used) in kinds.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != getattr(plain, name)]
        if given and not used:
            notes.append(f"no effect with --task {' '.join(options.task)}: {', '.join(given)}; see --task {task}")
    return notes


def _with_tokenizer(job: Job, needed: bool) -> Job:
    from mindgen.text.tokenizer import end_of_text_ids

    tokenizer = _load_tokenizer(job, needed)
    generation = _generation_config(job.source)
    ends = end_of_text_ids(tokenizer, generation, job.options.add_eos_token)
    size = job.source.spec.vocab_size
    if job.options.add_eos_token and ends[-1] >= size:
        raise ValueError(f"--add-eos-token {ends[-1]} is not a token id of this model; they go from 0 to {size - 1}")
    notes = [f"end-of-text id {end} is outside the vocabulary of {size}: ignored" for end in ends if end >= size]
    notes += _sampling_note(generation)
    return replace(job, tokenizer=tokenizer, end_ids=tuple(end for end in ends if end < size), notes=job.notes + notes)


def _load_tokenizer(job: Job, needed: bool) -> Tokenizer | None:
    """The tokenizer; None only where none is needed (all prompts are token ids), named or found."""
    from mindgen.text.folder import TokenizerFolder
    from mindgen.text.tokenizer import load_tokenizer

    options, folders = job.options, job.source.text_folders
    named = options.tokenizer_name_or_path or options.tokenizer_model
    folder = next((folder for folder in folders if TokenizerFolder(folder).has_vocabulary), folders[0])
    if not (needed or options.stop or named) and not TokenizerFolder(folder).has_vocabulary:
        return None
    return load_tokenizer(
        options.tokenizer_name_or_path or folder,
        options.tokenizer_type,
        options.tokenizer_model,
        use_fast=not options.tokenizer_not_use_fast,
    )


def _generation_config(source: Source) -> dict[str, Any]:
    """`generation_config.json`, empty where there is none."""
    from mindgen.weights.huggingface import read_json

    paths = [folder / "generation_config.json" for folder in source.text_folders]
    found = [path for path in paths if path.is_file()]
    return read_json(found[0]) if found else {}


_SAMPLING_DEFAULTS = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


def _sampling_note(generation: dict[str, object]) -> list[str]:
    stated = [f"{name}={generation[name]}" for name in _SAMPLING_DEFAULTS if generation.get(name)]
    return [f"generation_config.json suggests {', '.join(stated)}: not applied, say so by flags"] if stated else []


def _check_output(name: str | None) -> None:
    """Refuses an output file that could not be written at the end. ValueError names it."""
    if name is None:
        return
    try:
        with open(name, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ValueError(f"--output-file {name} cannot be written: {error.strerror}") from None


def _check_comparison(job: Job) -> None:
    """Refuses a folder that is none before weights are read; ValueError names it."""
    from mindgen.weights.huggingface import is_huggingface, open_huggingface

    name = job.options.compare_hf
    if name is None:
        return
    if not is_huggingface(Path(name)):
        raise ValueError(f"--compare-hf {name} is not a Hugging Face folder with weights")
    theirs, ours = open_huggingface(Path(name)).spec.vocab_size, job.source.spec.vocab_size
    if theirs != ours:
        raise ValueError(f"--compare-hf {name} has a vocabulary of {theirs}, but the model one of {ours}")
