"""`--task chat`: turns with the tokenizer's template, from a terminal or a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mindgen.commands.job import Job, room
from mindgen.commands.tasks import Task
from mindgen.engine.engine import Engine
from mindgen.engine.request import Request
from mindgen.text.chat import Command, Conversation, parse_command

_BANNER = "q, quit or exit ends the chat; clear or new starts another; Ctrl-C stops an answer"


def chat(job: Job, task: Task, engine: Engine) -> None:
    """Reads lines and streams answers until the user ends it or the input does."""
    conversation = Conversation(job.options.history_turns)
    print(_BANNER, file=sys.stderr)
    for number, line in enumerate(_lines()):
        command = parse_command(line)
        if command is Command.END:
            return
        if command is Command.WIPE:
            conversation.clear()
        elif line.strip():
            _turn(job, task, engine, conversation, line, number)


def _lines() -> Iterator[str]:
    """What the user types; the prompt goes to standard error, so that standard output holds answers alone."""
    while True:
        print("\nYou >> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def _turn(job: Job, task: Task, engine: Engine, conversation: Conversation, line: str, number: int) -> None:
    assert job.model.tokenizer is not None
    conversation.add_user(line)
    try:
        ids = job.model.tokenizer.apply_chat_template(conversation.messages)
        limit = room(len(ids), job.options, job.model.max_positions, line[:60])
    except ValueError as error:
        conversation.withdraw()
        print(f"mindgen: {error}", file=sys.stderr)
        return
    print("\nmindgen:", file=sys.stderr, flush=True)
    request = Request(number, tuple(ids), task.params(job.options, limit))
    conversation.add_assistant(_stream(engine, request))
    print(flush=True)


def _stream(engine: Engine, request: Request) -> str:
    """Prints the answer while it comes; after Ctrl-C what there is of it."""
    text = ""
    with _interruptible() as interrupted:
        engine.submit(request)
        while engine.has_work:
            if interrupted:
                engine.abort(request.id)
            for output in engine.step():
                print(output.text, end="", flush=True)
                text += output.text
                if output.message:
                    print(f"mindgen: {output.message}", file=sys.stderr)
    return text


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
