"""Renders the chat template that comes with a tokenizer: Jinja from a stranger, in a sandbox and with limits.

The variables, filters and whitespace rules are the ones that Hugging Face tokenizers give to their templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindgen.text.jinja_sandbox import Sandbox

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and what else a template may want

MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True)
class ChatTemplate:
    """One template. `special_tokens` are variables for it (`bos_token`); `owner` is where it is from, for messages."""

    text: str
    special_tokens: Mapping[str, Any]
    owner: str

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text. ValueError where the template is broken, fails, refuses or runs away."""
        variables = {
            **self.special_tokens,
            "messages": plain_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._sandbox.render(variables)
        except Exception as error:  # the template decides what is raised: the operators are Python's
            raise ValueError(f"the chat template of {self.owner} failed: {_describe(error)}") from error

    @cached_property
    def _sandbox(self) -> Sandbox:
        from mindgen.text.jinja_sandbox import Sandbox

        return Sandbox(self.text)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy with nothing but JSON values, keys whose value is None left out; ValueError for anything else."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    try:
        return [_plain_message(index, message) for index, message in enumerate(messages)]
    except RecursionError as error:
        raise ValueError("a message of the conversation is nested too deeply") from error


def _plain_message(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"message {index} of the conversation must look like {{'role': 'user', 'content': '...'}}, "
            f"not {str(message)[:100]!r}"
        )
    return {key: _plain(value, index) for key, value in message.items() if value is not None}


def _plain(value: Any, index: int) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, list):
        return [_plain(item, index) for item in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(item, index) for key, item in value.items()}
    raise ValueError(
        f"message {index} of the conversation holds a {type(value).__name__}; only JSON values are allowed"
    )


def _describe(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if line else ""
    return f"{type(error).__name__}: {str(error)[:MAX_ERROR_CHARACTERS]}{where}"
