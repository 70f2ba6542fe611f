"""What one sequence says and how it ends: tokens in, certain text and a finish reason out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from mindgen.engine.request import FinishReason, SamplingParams


class Detokenizer(Protocol):
    """Turns token ids into text, a piece at a time."""

    def push(self, ids: list[int]) -> str: ...

    def finish(self) -> str: ...


class StopMatcher(Protocol):
    """Holds text back while it may be the beginning of a stop string."""

    @property
    def stopped(self) -> bool: ...

    def push(self, text: str) -> tuple[str, bool]: ...

    def finish(self) -> str: ...


@dataclass(frozen=True)
class TextTools:
    """How the text of a sequence is made; every sequence gets its own."""

    detokenizer: Callable[[], Detokenizer]
    matcher: Callable[[tuple[str, ...]], StopMatcher]

    @classmethod
    def of(cls, tokenizer: Any) -> TextTools:
        """The tools of mindgen.text over a tokenizer."""
        from mindgen.text.stream import Detokenizer, StopMatcher

        return cls(lambda: Detokenizer(tokenizer), StopMatcher)


@dataclass(frozen=True)
class Ends:
    """The tokens that end a sequence. They are part of its token ids and not of its text."""

    eos: frozenset[int]
    stop: frozenset[int]

    @classmethod
    def of(cls, params: SamplingParams, eos_ids: Iterable[int]) -> Ends:
        return cls(frozenset() if params.ignore_eos else frozenset(eos_ids), frozenset(params.stop_token_ids))

    @property
    def ids(self) -> frozenset[int]:
        return self.eos | self.stop

    def reason(self, token: int) -> FinishReason | None:
        """Why the token is the last one, or None."""
        return "eos" if token in self.eos else "stop" if token in self.stop else None


class Transcript:
    """The text of one sequence, and when it is over. Without `tools` there is no text and there are no stop strings."""

    def __init__(self, params: SamplingParams, ends: Ends, tools: TextTools | None) -> None:
        self._most = params.max_new_tokens
        self._ends = ends
        self._count = 0
        self._detokenizer = tools.detokenizer() if tools else None
        self._matcher = tools.matcher(params.stop) if tools and params.stop else None

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that became certain, and the reason if this token is the last one."""
        self._count += 1
        reason = self._ends.reason(token)
        text, stopped = ("", False) if reason else self._read(token)
        if stopped:
            return text, "stop"
        if reason is None and self._count >= self._most:
            reason = "length"
        if reason is None:
            return text, None
        tail, stopped = self._flush()
        return text + tail, "stop" if stopped else reason

    def close(self) -> str:
        """The text held back, when the sequence ends for another reason than its tokens."""
        return self._flush()[0]

    def _read(self, token: int) -> tuple[str, bool]:
        return self._match(self._detokenizer.push([token])) if self._detokenizer else ("", False)

    def _flush(self) -> tuple[str, bool]:
        text, stopped = self._match(self._detokenizer.finish()) if self._detokenizer else ("", False)
        if stopped or not self._matcher:
            return text, stopped
        return text + self._matcher.finish(), self._matcher.stopped

    def _match(self, text: str) -> tuple[str, bool]:
        return self._matcher.push(text) if self._matcher else (text, False)
