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
    """How the text of a sequence is made; every sequence gets its own. `encode` gives the token ids of a text, without
    any that the tokenizer adds by itself; None where texts cannot be encoded."""

    detokenizer: Callable[[], Detokenizer]
    matcher: Callable[[tuple[str, ...]], StopMatcher]
    encode: Callable[[str], list[int]] | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> TextTools:
        """The tools of mindgen.text over a tokenizer."""
        from mindgen.text.stream import Detokenizer, StopMatcher

        return cls(
            lambda: Detokenizer(tokenizer), StopMatcher, lambda text: tokenizer.encode(text, add_special_tokens=False)
        )

    def ways_to_write(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The token ids of a word at the beginning of a text, after a space, and within a line.

        Raises ValueError where there is no tokenizer, and for a word without tokens.
        """
        if self.encode is None:
            raise ValueError("bad_words are token ids only with a tokenizer; use logit_bias for token ids")
        line, inside = self.encode("\n"), self.encode("\n" + word)
        ways = [self.encode(word), self.encode(" " + word)]
        if inside[: len(line)] == line:
            ways.append(inside[len(line) :])
        found = tuple(dict.fromkeys(tuple(way) for way in ways if way))
        if not found:
            raise ValueError(f"the tokenizer makes no tokens of the bad word {word!r}; leave it out")
        return found


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
    """The text of one sequence, and when it is over. Without `tools` there is no text and there are no stop strings.

    Stop strings count in the text from token number `min_new_tokens` on.
    """

    def __init__(self, params: SamplingParams, ends: Ends, tools: TextTools | None) -> None:
        self._most, self._least = params.max_new_tokens, params.min_new_tokens
        self._ends = ends
        self._count = 0
        self._detokenizer = tools.detokenizer() if tools else None
        self._matcher = tools.matcher(tuple(params.stop)) if tools and params.stop else None

    def begin(self, prompt: Iterable[int]) -> str:
        """The text of the prompt, of which the answer is the continuation. Stop strings do not count in it."""
        return self._detokenizer.push(list(prompt)) if self._detokenizer else ""

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
        return self._matcher.push(text) if self._matcher and self._count >= self._least else (text, False)
