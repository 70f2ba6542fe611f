"""One call of a user's: its requests on their way to the engine, and what came back of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from mindgen.engine.request import Output, Request
from mindgen.llm.questions import Question
from mindgen.llm.result import Result, Sample

if TYPE_CHECKING:
    from mindgen.llm.desk import Deliver, Desk

_SELDOM = 0.1  # seconds


class Asked(Protocol):
    """What a call wants of a host."""

    desk: Desk

    def ask(self, requests: Sequence[Request]) -> None: ...

    def abort(self, numbers: Sequence[int]) -> None: ...


class Call:
    """`count` requests with numbers of their own. Leaving its `with` block aborts what has not ended.

    `deliver` gets what the host has to say, and passes it on to `take` in the caller's thread.
    """

    def __init__(self, host: Asked, count: int, deliver: Deliver) -> None:
        self._host = host
        self._numbers = host.desk.open(count, deliver)
        self._left = set(self._numbers)
        self.results: list[Result] = []

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.desk.leave(self._numbers)
        if self._left:
            self._host.abort(sorted(self._left))

    def ask(self, questions: Sequence[Question]) -> None:
        """Sends one question for each number."""
        pairs = list(zip(self._numbers, questions, strict=True))
        self.results = [_empty(number, question) for number, question in pairs]
        self._host.ask([question.request(number) for number, question in pairs])

    @property
    def num_left(self) -> int:
        """How many requests have not ended."""
        return len(self._left)

    def take(self, news: list[Output] | Exception) -> list[Output]:
        """Puts outputs where they belong, and returns them. Raises what was delivered in their place."""
        if isinstance(news, Exception):
            raise news
        for output in news:
            result = self.results[output.request_id - self._numbers.start]
            result.add(output)
            if output.finish_reason and result.is_finished:
                self._left.discard(output.request_id)
        return news


def seldom(deliver: Deliver) -> Deliver:
    """Delivers what is new with the next end of a sample, and ten times a second, for those who want whole answers:
    a thread that is woken by every step takes the interpreter away from the engine as often."""
    held: list[Output] = []
    last = time.monotonic()

    def collect(news: list[Output] | Exception) -> None:
        nonlocal held, last
        if isinstance(news, Exception):
            deliver(news)
            return
        held += news
        if any(output.finish_reason for output in news) or time.monotonic() - last > _SELDOM:
            deliver(held)
            held, last = [], time.monotonic()

    return collect


class Progress:
    """A bar on standard error: prompts that are done, and tokens a second. `shown` None: on a terminal only."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._started = time.monotonic()
        self._tokens = 0

    def advance(self, outputs: Sequence[Output], done: int) -> None:
        """`done` prompts have ended by now."""
        self._tokens += sum(len(output.token_ids) for output in outputs)
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
        self._bar.update(done - self._bar.n)

    @classmethod
    @contextmanager
    def show(cls, total: int, shown: bool | None) -> Iterator[Progress]:
        from tqdm import tqdm

        hidden = not sys.stderr.isatty() if shown is None else not shown
        with tqdm(total=total, desc="generating", unit="prompt", disable=hidden) as bar:
            yield cls(bar)


def _empty(number: int, question: Question) -> Result:
    return Result(number, question.prompt, list(question.ids), [Sample() for _ in range(question.params.n)])
