"""What one command line asks for, checked as far as possible before any weight is read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from mindgen.commands.files import check_apart, check_writable
from mindgen.commands.options import GenerateConfig
from mindgen.commands.prompts import Prompt, gather_prompts, tokenize
from mindgen.commands.tasks import Task, find_tasks
from mindgen.config import EngineConfig
from mindgen.engine.request import Request
from mindgen.startup.opened import Opened, TokenizerChoice, open_model, with_tokenizer


@dataclass(frozen=True)
class Job:
    """A checked command line. Only rank 0 has prompts."""

    model: Opened
    options: GenerateConfig
    prompts: tuple[Prompt, ...] = ()

    def room(self, prompt: Prompt) -> int:
        """How many tokens may follow a prompt; ValueError with the numbers if none."""
        return room(len(prompt.ids), self.options, self.model.max_positions, prompt.shown)

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

    model = open_model(config, given_flags(parsed), options.tokenizer_name_or_path, tuple(notes))
    job = Job(model, options)
    return _with_prompts(job) if rank == 0 else job


def _with_prompts(job: Job) -> Job:
    options, tasks = job.options, find_tasks(job.options.task)
    prompts = gather_prompts(options) if any(not task.chat for task in tasks) else []
    needed = not prompts or bool(options.stop) or any(prompt.text is not None for prompt in prompts)
    model = with_tokenizer(job.model, _tokenizer_choice(options), needed)
    tokenized = tokenize(prompts, model.tokenizer, model.vocab_size, options)
    notes = (*model.notes, *_unused_options(options, tasks))
    job = Job(replace(model, notes=notes), options, tuple(tokenized))
    for task in tasks:
        job.requests(task)
        task.params(options, 1)  # also for chat, whose prompts are not known yet
        if task.chat and model.tokenizer is None:
            raise ValueError("--task chat needs a tokenizer; name one with --tokenizer-name-or-path")
        if task.chat and model.tokenizer is not None:
            model.tokenizer.require_chat_template()
    if options.output_file is not None:
        check_writable("--output-file", options.output_file)
        check_apart("--output-file", options.output_file, {"--prompt-file": _read_file(options)})
    _check_comparison(job)
    return job


def _tokenizer_choice(options: GenerateConfig) -> TokenizerChoice:
    return TokenizerChoice(
        options.tokenizer_name_or_path,
        options.tokenizer_type,
        options.tokenizer_model,
        not options.tokenizer_not_use_fast,
        options.add_eos_token,
        options.prompt_type,
    )


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


def _read_file(options: GenerateConfig) -> str | None:
    return None if options.prompt_file == "-" else options.prompt_file


def _check_comparison(job: Job) -> None:
    """Refuses a folder that is none before weights are read; ValueError names it."""
    from mindgen.weights.huggingface import is_huggingface, open_huggingface

    name = job.options.compare_hf
    if name is None:
        return
    if not is_huggingface(Path(name)):
        raise ValueError(f"--compare-hf {name} is not a Hugging Face folder with weights")
    theirs, ours = open_huggingface(Path(name)).spec.vocab_size, job.model.vocab_size
    if theirs != ours:
        raise ValueError(f"--compare-hf {name} has a vocabulary of {theirs}, but the model one of {ours}")
