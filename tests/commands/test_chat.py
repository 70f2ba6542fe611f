"""`generate --task chat`: turns that are answered, refused and failed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindgen.__main__ import main
from mindgen.commands.chat import chat
from mindgen.commands.job import Job
from mindgen.commands.options import GenerateConfig
from mindgen.commands.tasks import TASKS
from mindgen.engine.request import Output, Request
from tests.commands.damage import with_nan
from tests.commands.test_generate import ANSWER, DEMO

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    """Pipes lines into a greedy chat with the demo model: exit code, standard output, standard error."""

    def call(text: str, *arguments: str, load: Path = DEMO) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        flags = ["--load", str(load), "--device", "cpu", "--task", "chat", "--temperature", "0"]
        return main(["generate", *flags, *arguments]), *capfd.readouterr()

    return call


def test_chat_from_a_pipe(say: Say) -> None:
    code, out, err = say("how are you?\n\nclear\nhow are you?\nquit\nnever said\n")
    assert (code, out) == (0, ANSWER * 2)
    assert err.count("You >> ") == 5


def test_a_turn_that_cannot_fit_the_cache_is_refused_and_the_chat_goes_on(say: Say) -> None:
    cache = ("--kv-cache-memory", "0.0012", "--block-size", "16", "--max-new-tokens", "24")
    code, out, err = say("how are you?\n" + "x " * 600 + "\nclear\nhow are you?\n", *cache)
    assert (code, out) == (0, ANSWER * 2)
    assert "mindgen: the conversation has 6" in err and "but the cache has 19; lower --max-new-tokens, " in err
    assert err.count("You >> ") == 5


class Scripted:
    """An engine whose answers are told beforehand; those that are empty fail."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)
        self._asked: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self._asked)

    def submit(self, request: Request) -> None:
        self._asked.append(request)

    def step(self) -> list[Output]:
        text, request = self._answers.pop(0), self._asked.pop()
        if text:
            return [Output(request.id, 0, text=text, finish_reason="eos")]
        return [Output(request.id, 0, finish_reason="error", message="boom")]


class Listener:
    """A tokenizer that remembers the conversations that it was given."""

    def __init__(self) -> None:
        self.heard: list[list[str]] = []

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        self.heard.append([message["content"] for message in messages])
        return [5]


def test_an_answer_that_fails_is_forgotten_and_said_in_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    listener = Listener()
    model: Any = SimpleNamespace(tokenizer=listener, max_positions=99)
    engine: Any = Scripted("first", "", "third")
    assert not chat(Job(model, GenerateConfig(task=("chat",))), TASKS["chat"], engine)
    assert listener.heard == [["one"], ["one", "first", "two"], ["one", "first", "three"]]
    assert "mindgen: boom" in capsys.readouterr().err


def test_a_chat_with_a_failed_answer_ends_with_exit_code_1(say: Say, tmp_path: Path) -> None:
    code, _, err = say("how are you?\n", load=with_nan(DEMO, tmp_path / "nan", "model.norm.weight"))
    assert code == 1 and "no usable logits" in err
