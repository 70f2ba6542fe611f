"""PaddleNLP's chat templates: a `chat_template.json` with `system`, `conversation` and `query`, each of them Jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindgen.text.folder import MAX_TEMPLATE_BYTES, read_json

if TYPE_CHECKING:
    from mindgen.text.jinja_sandbox import Sandbox

FILE_NAME = "chat_template.json"


@dataclass(frozen=True)
class TurnTemplate:
    """How system text, past turns and the question are written.

    system knows the variables of a line's context; conversation is how the user and the assistant of one turn are
    written, and knows `user`, `bot` and `index` too; query knows `query` and `index`. owner: for messages.
    """

    query: str
    conversation: tuple[str, str]
    system: str | None
    owner: str

    def render(self, turns: Sequence[tuple[str, str]], question: str, context: Mapping[str, Any]) -> str:
        """The whole conversation as text. ValueError where a template is broken, fails or runs away."""
        pieces = [] if self.system is None else [self._write("system", context)]
        for index, (user, bot) in enumerate(turns):
            values = {**context, "user": user, "bot": bot, "index": index}
            pieces += [self._write("user", values), self._write("bot", values)]
        pieces.append(self._write("query", {**context, "query": question, "index": len(turns)}))
        return "".join(pieces)

    def _write(self, part: str, values: Mapping[str, Any]) -> str:
        try:
            return self._sandboxes[part].render(dict(values))
        except Exception as error:  # the template decides what is raised: the operators are Python's
            raise ValueError(f"{self.owner} failed: {type(error).__name__}: {str(error)[:500]}") from error

    @cached_property
    def _sandboxes(self) -> dict[str, Sandbox]:
        from jinja2 import TemplateError

        from mindgen.text.jinja_sandbox import Sandbox

        user, bot = self.conversation
        parts = {"system": self.system or "", "user": user, "bot": bot, "query": self.query}
        try:
            return {name: Sandbox(text) for name, text in parts.items()}
        except TemplateError as error:
            raise ValueError(f"{self.owner} holds no Jinja: {error}") from error


def read_turn_template(path: Path) -> TurnTemplate:
    """The template in a file, or in a folder's chat_template.json. ValueError names what is missing or wrong."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"--chat_template {path}: there is no {file}; give a {FILE_NAME}, its folder, or none")
    stated = read_json(file, MAX_TEMPLATE_BYTES)
    query, system, turn = stated.get("query"), stated.get("system"), stated.get("conversation")
    if not isinstance(query, str):
        raise ValueError(f'{file}: "query" is {query!r:.80}; it must be a text, how the question is written')
    if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
        raise ValueError(f'{file}: "conversation" is {turn!r:.80}; it must be two texts, of user and assistant')
    if not (system is None or isinstance(system, str)):
        raise ValueError(f'{file}: "system" is {system!r:.80}; it must be a text')
    return TurnTemplate(query, (turn[0], turn[1]), system, str(file))


def has_turn_template(folder: Path) -> bool:
    """True if a model's folder holds such a template; Hugging Face gives other files the same name."""
    file = folder / FILE_NAME
    return file.is_file() and "query" in read_json(file, MAX_TEMPLATE_BYTES)
