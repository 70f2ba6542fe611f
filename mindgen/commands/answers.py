"""Shows what was generated: text alone to standard output, everything about it to standard error."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mindgen.commands.compare import compare
from mindgen.commands.job import Job
from mindgen.commands.prompts import Prompt
from mindgen.commands.tasks import Task
from mindgen.engine.engine import Engine
from mindgen.llm.result import Sample

_WIDTH = 46


def answer(job: Job, task: Task, engine: Engine, first: bool) -> bool:
    """Runs one task over all prompts and shows the answers; False if one failed.

    The `first` task begins the output file anew, once there is an answer. What was finished before an error or Ctrl-C
    is written all the same.
    """
    started = time.monotonic()
    count = max(1, job.options.num_return_sequences)
    answers = [[Sample() for _ in range(count)] for _ in job.prompts]
    printer = _Printer(job, task, answers)
    try:
        for output in engine.run(job.requests(task)):
            answers[output.request_id][output.index].add(output)
            printer.show(finished_only=task.beams or not job.options.stream)
    finally:
        records = _records(job, task, answers)
        if job.options.output_file is not None and records:
            _write_records(Path(job.options.output_file), records, "w" if first else "a")
    print(f"Elapsed: {time.monotonic() - started:.2f}s", file=sys.stderr)
    if job.options.compare_hf is not None:
        compare(job, task, [samples[0].token_ids for samples in answers])
    return all(sample.finish_reason != "error" for samples in answers for sample in samples)


class _Printer:
    """Prints answers in the order of the prompts, as much of them as is there."""

    def __init__(self, job: Job, task: Task, answers: list[list[Sample]]):
        self._job, self._task = job, task
        self._queue = [
            (prompt, index, sample)
            for prompt, samples in zip(job.prompts, answers, strict=True)
            for index, sample in enumerate(samples)
        ]
        self._at = 0  # the answer that is being printed
        self._written = 0  # characters of it that are out
        if task.beams and job.options.stream:
            print("beam search is decided at its end, so the text comes in one piece", file=sys.stderr)

    def show(self, finished_only: bool) -> None:
        while self._at < len(self._queue):
            prompt, index, sample = self._queue[self._at]
            if sample.finish_reason is None and (finished_only or not sample.token_ids):
                return
            if not self._written:
                self._head(prompt, index)
            self._write(sample)
            if sample.finish_reason is None:
                return
            self._foot(sample)
            self._at, self._written = self._at + 1, 0

    def _write(self, sample: Sample) -> None:
        text = self._text(sample)
        sys.stdout.write(text[max(0, self._written - 1) :])
        sys.stdout.flush()
        self._written = len(text) + 1  # one more than was written, so that an empty text has its heading once

    def _text(self, sample: Sample) -> str:
        return sample.text if self._job.model.tokenizer is not None else ",".join(map(str, sample.token_ids))

    def _head(self, prompt: Prompt, index: int) -> None:
        of = f" [{index + 1}]" if self._job.options.num_return_sequences > 1 else ""
        title = f" {self._task.title}{of} ".center(_WIDTH, "=")
        shown = prompt.text if prompt.text is not None else prompt.shown
        print(f"\n{title}\nYou:\n{shown}\n\nmindgen:", file=sys.stderr, flush=True)

    def _foot(self, sample: Sample) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()
        if sample.message:
            print(f"mindgen: {sample.message}", file=sys.stderr)
        if self._job.options.logprobs is not None:
            for line in _logprob_lines(sample):
                print(line, file=sys.stderr)
        print("=" * _WIDTH, file=sys.stderr, flush=True)


def _logprob_lines(sample: Sample) -> list[str]:
    lines = []
    for entry in sample.logprobs or ():
        others = " ".join(f"{token}:{logprob:.4f}" for token, logprob in entry.top)
        lines.append(f"token {entry.token_id} logprob {entry.logprob:.4f} {others}".rstrip())
    return lines


def _records(job: Job, task: Task, answers: list[list[Sample]]) -> list[dict[str, Any]]:
    pairs = zip(job.prompts, answers, strict=True)
    return [_record(prompt, samples, task) for prompt, samples in pairs if all(s.finish_reason for s in samples)]


def _record(prompt: Prompt, samples: list[Sample], task: Task) -> dict[str, Any]:
    """One line of the output file; with several answers the first stands at the top and all of them in `samples`."""
    record = {"prompt": prompt.text if prompt.text is not None else list(prompt.ids)} | _fields(samples[0])
    record |= {"num_prompt_tokens": len(prompt.ids), "task": task.name}
    return record if len(samples) == 1 else record | {"samples": [_fields(sample) for sample in samples]}


def _fields(sample: Sample) -> dict[str, Any]:
    values: dict[str, Any] = {"text": sample.text, "token_ids": sample.token_ids, "finish_reason": sample.finish_reason}
    if sample.logprobs:
        values["logprobs"] = [{"token": e.token_id, "logprob": e.logprob, "top": dict(e.top)} for e in sample.logprobs]
    return values | ({"error": sample.message} if sample.message else {})


def _write_records(path: Path, records: list[dict[str, Any]], mode: str) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except OSError as error:
        raise ValueError(f"--output-file {path} cannot be written: {error.strerror}") from None
