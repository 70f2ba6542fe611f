"""A conversation with its history, and the words that steer an interactive chat."""

from __future__ import annotations

from enum import Enum


class Command(Enum):
    """What a line typed into a chat asks for, when it is not said to the model."""

    END = "end"
    WIPE = "wipe"


COMMANDS = {
    "q": Command.END,
    "quit": Command.END,
    "exit": Command.END,
    "clear": Command.WIPE,
    "new": Command.WIPE,
}


def parse_command(line: str) -> Command | None:
    """The command that the whole line is, spaces around it aside; None for a line that is meant for the model."""
    return COMMANDS.get(line.strip())


class Conversation:
    """Messages of one chat: an optional system message, at most `history_turns` answered turns, and what was just said.

    A turn is what the user said with the answer to it. When a new one begins, the oldest are dropped beyond
    `history_turns` (None keeps all, 0 none).
    """

    def __init__(self, history_turns: int | None = None, system: str | None = None) -> None:
        if history_turns is not None and history_turns < 0:
            raise ValueError(f"--history-turns is {history_turns}; it must be 0 or more")
        self._history_turns = history_turns
        self._system = system
        self._turns: list[tuple[str, str]] = []
        self._question: str | None = None

    def add_user(self, text: str) -> None:
        """What the user says; the last answer, if there was a question, must be added before."""
        assert self._question is None, "the last user message has no answer yet"
        self._question = text
        self._drop_oldest()

    def add_assistant(self, text: str) -> None:
        """The answer, or what there was of it, to the last user message."""
        assert self._question is not None, "there is no user message to answer"
        self._turns.append((self._question, text))
        self._question = None
        self._drop_oldest()

    def withdraw(self) -> None:
        """Takes back a user message that will get no answer, because it was refused."""
        self._question = None

    def clear(self) -> None:
        """Forgets everything but the system message."""
        self._turns = []
        self._question = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """What a chat template is given, oldest first."""
        spoken = [] if self._system is None else [_message("system", self._system)]
        for question, answer in self._turns:
            spoken += [_message("user", question), _message("assistant", answer)]
        return spoken if self._question is None else [*spoken, _message("user", self._question)]

    def _drop_oldest(self) -> None:
        if self._history_turns is not None:
            self._turns = self._turns[max(0, len(self._turns) - self._history_turns) :]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
