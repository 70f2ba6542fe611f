"""The input of `predict`: JSON lines with `src` and perhaps `tgt`, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindgen.text.unicode import require_utf8

BUILT_IN_PROMPT = "解释一下温故而知新"  # PaddleNLP's
_KNOWN = ("src", "tgt", "context")


@dataclass(frozen=True)
class Line:
    """One input. number: counts all lines of the file from 1. src, tgt: as the line has them.

    turns: (user, assistant) pairs before the question, oldest first. context: variables of a chat template; `system` is
    the system text. is_chat: it can only be said in a chat template. unused: further keys of the line.
    """

    number: int
    src: Any
    tgt: Any
    question: str
    turns: tuple[tuple[str, str], ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        return bool(self.turns or self.context)


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and why."""

    number: int
    reason: str


def check_data_file(name: str) -> None:
    """Refuses what is no regular file, which could not be read twice. ValueError names it."""
    if not Path(name).exists():
        raise ValueError(f"--data_file {name} does not exist")
    if not Path(name).is_file():
        raise ValueError(f"--data_file {name} is not a regular file; it is read twice, to check it first")


def read_lines(name: str | None, num_built_in: int) -> Iterator[Line | BadLine]:
    """The lines of a file in order, empty ones left out; without one the built-in prompt so many times."""
    if name is None:
        yield from (Line(number, BUILT_IN_PROMPT, "", BUILT_IN_PROMPT) for number in range(1, num_built_in + 1))
        return
    try:
        with open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except OSError as error:
        raise ValueError(f"--data_file {name} cannot be read: {error.strerror}") from None


def _parse(number: int, line: bytes) -> Line | BadLine:
    try:
        return _line(number, _object(line))
    except ValueError as error:
        return BadLine(number, str(error))


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_once_each)
    except KeyError as error:
        raise ValueError(f"has the key {error.args[0]!r} twice") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError('is not a JSON object; a line looks like {"src": "...", "tgt": "..."}')
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose standard leaves open which of two equal keys counts. KeyError for the second one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def _line(number: int, value: dict[str, Any]) -> Line:
    if "src" not in value:
        raise ValueError('has no "src"')
    asked = _texts("src", value["src"])
    if not asked:
        raise ValueError('"src" is empty')
    answers, context = _texts("tgt", value.get("tgt", "")), value.get("context", {})
    if len(asked) > 1 and not len(asked) - 1 <= len(answers) <= len(asked):
        raise ValueError(
            f'"src" has {len(asked)} turns, so "tgt" must have the {len(asked) - 1} answers before the last question, '
            f"or one more; it has {len(answers)}"
        )
    if not isinstance(context, dict) or not isinstance(context.get("system", ""), str):
        raise ValueError('"context" must be an object, and its "system" a text')
    turns = tuple(zip(asked[:-1], answers, strict=False))
    unused = tuple(key for key in value if key not in _KNOWN)
    return Line(number, value["src"], value.get("tgt", ""), asked[-1], turns, context, unused)


def _texts(name: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{name}" must be a text or a list of texts')
    for text in texts:
        require_utf8(text)
    return texts
