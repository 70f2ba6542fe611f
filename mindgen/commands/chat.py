"""`--task chat`: turns with the tokenizer's template, from a terminal or a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mindgen.commands.fitting import submit
from mindgen.commands.job import Job, room
from mindgen.commands.tasks import Task, sampling_flags
from mindgen.engine.engine import Engine
from mindgen.engine.request import Request
from mindgen.text.chat import Command, Conversation, parse_command

_BANNER = "q, quit or exit ends the chat; clear or new starts another; Ctrl-C stops an answer"


def chat(job: Job, task: Task, engine: Engine) -> bool:
    """Reads lines and streams answers until the user ends it or the input does; False if an answer failed.

    A turn that is refused or fails is forgotten, and the next one follows.
    """
    good = True
    conversation = Conversation(job.options.history_turns)
    print(_BANNER, file=sys.stderr)
    for number, line in enumerate(_lines()):
        command = parse_command(line)
        if command is Command.END:
            return good
        if command is Command.WIPE:
            conversation.clear()
        elif line.strip():
            good &= _turn(job, task, engine, conversation, line, number)
    return good


def _lines() -> Iterator[str]:
    """What the user types; the prompt goes to standard error, so that standard output holds answers alone."""
    while True:
        print("\nYou >> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def _turn(job: Job, task: Task, engine: Engine, conversation: Conversation, line: str, number: int) -> bool:
    """False if the engine failed at the answer; what it refuses is said and is no failure."""
    conversation.add_user(line)
    try:
        request = _request(job, task, conversation, line, number)
        submit(engine, "the conversation", request, sampling_flags(job.options))
    except ValueError as error:
        conversation.withdraw()
        print(f"mindgen: {error}", file=sys.stderr)
        return True
    print("\nmindgen:", file=sys.stderr, flush=True)
    answer = _stream(engine, number)
    if answer is None:
        conversation.withdraw()
    else:
        conversation.add_assistant(answer)
    print(flush=True)
    return answer is not None


def _request(job: Job, task: Task, conversation: Conversation, line: str, number: int) -> Request:
    assert job.model.tokenizer is not None
    ids = job.model.tokenizer.apply_chat_template(conversation.messages)
    limit = room(len(ids), job.options, job.model.max_positions, line[:60])
    return Request(number, tuple(ids), task.params(job.options, limit))


def _stream(engine: Engine, number: int) -> str | None:
    """Prints the answer while it comes; after Ctrl-C what there is of it, and None if it failed."""
    text, failed = "", False
    with _interruptible() as interrupted:
        while engine.has_work:
            if interrupted:
                engine.abort(number)
            for output in engine.step():
                print(output.text, end="", flush=True)
                text += output.text
                failed |= output.finish_reason == "error"
                if output.message:
                    print(f"mindgen: {output.message}", file=sys.stderr)
    return None if failed else text


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of tearing through a step that other ranks take part in."""
    seen: list[int] = []

    def note(number: int, _frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
