"""Answers all lines of `predict`'s input: so many at once as may be, and in the order of the input."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mindgen.commands.predict.data import BadLine
from mindgen.commands.predict.output import OutputFile
from mindgen.commands.predict.prompts import Prompt, Prompter
from mindgen.commands.predict.survey import Survey
from mindgen.engine.engine import Engine
from mindgen.llm.result import Sample

_MOST_HELD = 4096  # answers that wait for an earlier one


@dataclass
class _Asked:
    prompt: Prompt
    answer: Sample = field(default_factory=Sample)


def predict(prompter: Prompter, found: Survey, engine: Engine) -> bool:
    """Answers what is left of the input and writes it. False if an answer failed.

    Raises ValueError, before anything is written, for a request that the cache can never hold, and for an output file
    that was written to after the survey. An interrupt leaves whole lines.
    """
    options, started = prompter.options, time.monotonic()
    _check_largest(found, prompter, engine)
    good, num_tokens = True, 0
    with closing(OutputFile(options, found.checked)) as file, closing(Progress(found.num_done, found.num_lines)) as bar:
        try:
            for asked in answers(prompter, found.num_done, engine, bar):
                good &= asked.answer.finish_reason != "error"
                num_tokens += len(asked.answer.token_ids)
                file.write(_record(asked))
                if not options.quiet:
                    _show(asked, bar)
        except KeyboardInterrupt:
            print(
                f"mindgen: interrupted; {options.output_file} holds whole lines, continue with --resume",
                file=sys.stderr,
            )
            raise
    seconds = time.monotonic() - started
    rate = f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:.1f} tokens/s)"
    print(f"{options.output_file}: {found.num_lines - found.num_done} lines, {rate}", file=sys.stderr)
    return good


def answers(prompter: Prompter, num_done: int, engine: Engine, bar: Progress) -> Iterator[_Asked]:
    """The finished answers in the order of the input, from line `num_done` of those that can be used."""
    prompts = islice(_usable(prompter), num_done, None)
    queue: deque[_Asked] = deque()  # all that were asked and not given out yet, in order
    running: dict[int, _Asked] = {}
    while True:
        room = min(prompter.options.batch_size - len(running), _MOST_HELD + prompter.options.batch_size - len(queue))
        for prompt in islice(prompts, max(0, room)):
            engine.submit(prompt.request(prompter.options))
            queue.append(_Asked(prompt))
            running[prompt.line.number] = queue[-1]
        if not queue:
            return
        for output in engine.step():
            running[output.request_id].answer.add(output)
            bar.count(len(output.token_ids))
            if output.finish_reason is not None:
                del running[output.request_id]
        while queue and queue[0].answer.finish_reason is not None:
            yield queue.popleft()
            bar.update()


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
    """Asks for the largest request and takes it back, because the engine knows what it can ever serve."""
    assert found.largest is not None
    request = found.largest.request(prompter.options)
    try:
        engine.submit(request)
    except ValueError as error:
        raise ValueError(f"line {found.largest.line.number}: {error}") from None
    engine.abort(request.id)
    engine.step()


def _record(asked: _Asked) -> dict[str, Any]:
    line, answer = asked.prompt.line, asked.answer
    record = {"src": line.src, "tgt": line.tgt, "output": answer.text}
    return record | {"error": answer.message} if answer.finish_reason == "error" else record


def _show(asked: _Asked, bar: Progress) -> None:
    """What PaddleNLP prints of an answer."""
    line, answer = asked.prompt.line, asked.answer
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

    def update(self) -> None:
        self._bar.update()

    def print(self, text: str) -> None:
        """To standard output, without tearing the bar."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()
