"""Answers all lines of `predict`'s input: so many at once as may be, and in the order of the input."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

from mindgen.commands.fitting import check_served
from mindgen.commands.predict.data import BadLine
from mindgen.commands.predict.journal import Journal, journal_path
from mindgen.commands.predict.options import FLAGS
from mindgen.commands.predict.output import OutputFile
from mindgen.commands.predict.prompts import Prompt, Prompter
from mindgen.commands.predict.records import Record
from mindgen.commands.predict.survey import Survey
from mindgen.engine.engine import Engine
from mindgen.llm.result import Sample

_MOST_HELD = 4096  # answers that wait for an earlier one


@dataclass(eq=False)
class Asked:
    """A prompt and what there is of its answer."""

    prompt: Prompt
    answer: Sample = field(default_factory=Sample)

    @property
    def number(self) -> int:
        return self.prompt.line.number

    @property
    def has_ended(self) -> bool:
        return self.answer.finish_reason is not None

    @property
    def has_failed(self) -> bool:
        return self.answer.finish_reason == "error"

    @property
    def record(self) -> Record:
        """Its line of the output."""
        line, answer = self.prompt.line, self.answer
        record = {"src": line.src, "tgt": line.tgt, "output": answer.text}
        return record | {"error": answer.message} if self.has_failed else record


def predict(prompter: Prompter, found: Survey, engine: Engine) -> bool:
    """Answers what is left of the input and writes it. False if an answer failed, in this run or in that resumed.

    Raises ValueError, before anything is written, for a request that the cache can never hold, and for an output file
    that was written to after the survey. An interrupt leaves whole lines, and beside them what ended out of turn.
    """
    options, started = prompter.options, time.monotonic()
    _check_largest(found, prompter, engine)
    num_failed, num_tokens = found.num_failed, 0
    with (
        closing(OutputFile(options, found.checked)) as file,
        closing(Journal(journal_path(options.output_file), found.waiting)) as journal,
        closing(Progress(found.num_done, found.num_lines)) as bar,
    ):
        try:
            for ready in answers(prompter, found, engine, bar, journal):
                for asked in ready:
                    file.write(asked.record)
                    journal.drop(asked.number)
                for asked in ready:
                    num_failed += asked.has_failed
                    num_tokens += len(asked.answer.token_ids)
                    _show(asked, bar, options.quiet)
        except KeyboardInterrupt:
            print(
                f"mindgen: interrupted; {options.output_file} holds whole lines, continue with --resume",
                file=sys.stderr,
            )
            raise
    seconds = time.monotonic() - started
    rate = f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:.1f} tokens/s)"
    print(f"{options.output_file}: {found.num_lines - found.num_done} lines, {rate}", file=sys.stderr)
    if num_failed:
        print(f'mindgen: answers that failed, whose lines have an "error": {num_failed}', file=sys.stderr)
    return not num_failed


def answers(
    prompter: Prompter, found: Survey, engine: Engine, bar: Progress, journal: Journal
) -> Iterator[list[Asked]]:
    """The answers in the order of the input, from the first that is not written; together what is known together.

    Those that ended before their turn are in the journal by then.
    """
    prompts = islice(_usable(prompter), found.num_done, None)
    queue: deque[Asked] = deque()  # all that were asked and not given out yet, in order
    running: dict[int, Asked] = {}
    while True:
        most = prompter.options.batch_size
        while len(running) < most and len(queue) < _MOST_HELD + most and (prompt := next(prompts, None)):
            queue.append(_asked(prompt, found.waiting.get(prompt.line.number)))
            if not queue[-1].has_ended:
                engine.submit(prompt.request(prompter.options))
                running[prompt.line.number] = queue[-1]
        if not queue:
            return
        ended = _step(engine, running, bar) if running else []
        ready = [queue.popleft() for _ in range(_num_ended(queue))]
        for asked in ended:
            if asked not in ready:
                journal.add(asked.number, asked.record)
        if ready:
            yield ready
            bar.update(len(ready))


def _asked(prompt: Prompt, record: Record | None) -> Asked:
    """With the answer that an interrupted run left, if any."""
    if record is None:
        return Asked(prompt)
    failed = "error" in record
    return Asked(prompt, Sample(record["output"], [], "error" if failed else "stop", message=record.get("error")))


def _step(engine: Engine, running: dict[int, Asked], bar: Progress) -> list[Asked]:
    """Takes the news of a step; those that ended."""
    ended = []
    for output in engine.step():
        running[output.request_id].answer.add(output)
        bar.count(len(output.token_ids))
        if output.finish_reason is not None:
            ended.append(running.pop(output.request_id))
    return ended


def _num_ended(queue: deque[Asked]) -> int:
    """How many at its front have ended."""
    return next((place for place, asked in enumerate(queue) if not asked.has_ended), len(queue))


def _usable(prompter: Prompter) -> Iterator[Prompt]:
    for prompt in prompter.prompts():
        if isinstance(prompt, Prompt):
            yield prompt
        elif not prompter.options.skip_bad_lines:
            raise _changed(prompter, prompt)


def _changed(prompter: Prompter, line: BadLine) -> ValueError:
    return ValueError(
        f"{prompter.options.data_file} has changed since it was checked: line {line.number} {line.reason}"
    )


def _check_largest(found: Survey, prompter: Prompter, engine: Engine) -> None:
    assert found.largest is not None
    asked = f"line {found.largest.line.number}", found.largest.request(prompter.options)
    check_served(engine, [asked], FLAGS)


def _show(asked: Asked, bar: Progress, quiet: bool) -> None:
    """What PaddleNLP prints of an answer, and always why it failed."""
    line, answer = asked.prompt.line, asked.answer
    if not quiet:
        for title, text in (("Source", line.src), ("Target", line.tgt), ("Output", answer.text)):
            bar.print(f"***********{title}**********\n{text}")
    if answer.message:
        print(f"mindgen: line {line.number}: {answer.message}", file=sys.stderr)


class Progress:
    """A bar on a terminal's standard error with lines and tokens a second; elsewhere nothing."""

    def __init__(self, num_done: int, num_lines: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=num_lines, initial=num_done, unit="line", disable=not sys.stderr.isatty())
        self._started, self._num_tokens = time.monotonic(), 0

    def count(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        if not self._bar.disable:
            seconds = max(time.monotonic() - self._started, 1e-9)
            self._bar.set_postfix_str(f"{self._num_tokens / seconds:.1f} tokens/s", refresh=False)

    def update(self, num_lines: int) -> None:
        self._bar.update(num_lines)

    def print(self, text: str) -> None:
        """To standard output, without tearing the bar."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()
