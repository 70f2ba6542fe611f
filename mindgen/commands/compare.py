"""`--compare-hf`: the same prompts through transformers, side by side."""

from __future__ import annotations

import sys
from itertools import zip_longest
from typing import Any

from mindgen.commands.job import Job
from mindgen.commands.prompts import Prompt
from mindgen.commands.tasks import Task


def compare(job: Job, task: Task, ours: list[list[int]]) -> None:
    """Shows both texts of every prompt and the first position where they differ, or that they agree."""
    model = _load(job)
    for prompt, token_ids in zip(job.prompts, ours, strict=True):
        theirs = _generate(model, prompt, task, job)
        _show(prompt, _text(job, token_ids), _text(job, theirs), _verdict(token_ids, theirs))


def _load(job: Job) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from mindgen.startup.ready import computing_dtype

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(job.options.compare_hf),
        dtype=computing_dtype(job.model.config, job.model.source.spec),
        trust_remote_code=False,
        local_files_only=True,
    )
    return model.eval()


def _generate(model: Any, prompt: Prompt, task: Task, job: Job) -> list[int]:
    """What transformers generates with nothing but the options that we have applied ourselves."""
    import torch
    from transformers import GenerationConfig

    params = task.params(job.options, job.room(prompt))
    ends = [] if params.ignore_eos else list(job.model.end_ids)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        num_beams=params.num_beams,
        length_penalty=params.length_penalty,
        repetition_penalty=params.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    ids = torch.tensor([prompt.ids])
    with torch.inference_mode():
        generated = model.generate(ids, attention_mask=torch.ones_like(ids))
    return [int(token) for token in generated[0, ids.shape[1] :]]


def _verdict(ours: list[int], theirs: list[int]) -> str:
    for position, (our, their) in enumerate(zip_longest(ours, theirs)):
        if our != their:
            return f"first difference at token {position}: mindgen {our}, HuggingFace {their}"
    return f"both agree on all {len(ours)} tokens"


def _show(prompt: Prompt, ours: str, theirs: str, verdict: str) -> None:
    print(f"\nYou:\n{prompt.shown}\n\nmindgen:\n{ours}\n\nHuggingFace:\n{theirs}\n\n{verdict}", file=sys.stderr)


def _text(job: Job, token_ids: list[int]) -> str:
    return ",".join(map(str, token_ids)) if job.model.tokenizer is None else job.model.tokenizer.decode(token_ids)
