"""The parts of `mindgen predict`: how prompts are made and cut, and how much is under way at a time."""

from __future__ import annotations

import json
import resource
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mindgen.commands.predict import _prepare, _serve
from mindgen.commands.predict.benchmark import check_room
from mindgen.commands.predict.chat_template import read_turn_template
from mindgen.commands.predict.data import BadLine, Line, read_lines
from mindgen.commands.predict.journal import Journal
from mindgen.commands.predict.options import PredictConfig
from mindgen.commands.predict.output import OutputFile
from mindgen.commands.predict.prompts import Prompt, Prompter, make_prompter
from mindgen.commands.predict.run import Progress, answers, predict
from mindgen.commands.predict.survey import Survey, survey
from mindgen.config import EngineConfig
from mindgen.engine.blocks import BlockPool
from mindgen.engine.engine import Engine
from mindgen.engine.request import Output, Request
from mindgen.engine.scheduler import Scheduler
from mindgen.startup.opened import TokenizerChoice, open_model, with_tokenizer
from tests.commands.test_predict import DEMO, written
from tests.engine.fakes import FakeRunner, hashed_logits

TEMPLATE = {
    "system": "<s>{% if system %}<|system|>{{ system }}{% endif %}",
    "conversation": ["<|user|>{{user}}", "<|assistant|>{{bot}}</s>"],
    "query": "<|user|>{{query}}<|assistant|>",
}
CHAT = {"src": ["hi", "who?", "why?"], "tgt": ["hello", "me"], "context": {"system": "Be kind."}}


def prompter(**options: Any) -> Prompter:
    """The demo model's."""
    model = with_tokenizer(open_model(EngineConfig(model=str(DEMO))), TokenizerChoice())
    return make_prompter(PredictConfig(model_name_or_path=str(DEMO), **options), model)


def prompts(**options: Any) -> list[tuple[int, ...]]:
    made = list(prompter(**options).prompts())
    assert all(isinstance(prompt, Prompt) for prompt in made), made
    return [prompt.ids for prompt in made if isinstance(prompt, Prompt)]


def test_paddlenlps_template_writes_what_the_tokenizers_own_writes(tmp_path: Path) -> None:
    data = written(tmp_path / "in", CHAT, {"src": "hi"}, CHAT | {"tgt": ["hello", "me", "not shown"]})
    written(tmp_path / "chat_template.json", TEMPLATE)
    own = prompts(data_file=data)
    assert own[0] == own[2] != own[1]
    for name in (tmp_path, tmp_path / "chat_template.json"):
        assert prompts(data_file=data, chat_template=str(name)) == own
    assert prompts(data_file=data, chat_template=str(DEMO)) == own
    plain = written(tmp_path / "plain", {"src": "hi"})
    judge = AutoTokenizer.from_pretrained(DEMO)
    assert prompts(data_file=plain, chat_template="none") == [tuple(judge("hi").input_ids)]
    refused = list(prompter(data_file=data, chat_template="none").prompts())
    assert "no chat template" in refused[0].reason  # type: ignore[union-attr]


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_a_long_prompt_loses_its_beginning_as_in_transformers(tmp_path: Path, length: int) -> None:
    text = "one two three four five six seven eight nine ten"
    data = written(tmp_path / "in", {"src": text})
    judge = AutoTokenizer.from_pretrained(DEMO, truncation_side="left")
    expected = judge(text, truncation=True, max_length=length).input_ids
    assert prompts(data_file=data, chat_template="none", src_length=length) == [tuple(expected)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, '"query" is None'),
        ({"conversation": ["a"]}, '"conversation" is'),
        ({"system": 5}, '"system" is 5'),
        ({"query": "{% if %}"}, "holds no Jinja"),
        ({"query": "{{ query.__class__.__mro__ }}"}, "SecurityError"),
        ({"query": "{% for i in range(10**9) %}x{% endfor %}"}, "failed"),
    ],
)
def test_a_template_that_is_none_or_runs_away_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written(tmp_path / "chat_template.json", TEMPLATE | change)
    with pytest.raises(ValueError) as error:
        read_turn_template(tmp_path).render([], "x", {})
    assert message in str(error.value)


def test_what_leaves_no_room_is_the_limit_that_was_reached(tmp_path: Path) -> None:
    data = written(tmp_path / "in", {"src": "one two three four five six seven eight nine ten"})

    def reason(**options: Any) -> str:
        (line,) = prompter(data_file=data, chat_template="none", **options).prompts()
        assert isinstance(line, BadLine)
        return line.reason

    assert "--total_max_length is 6, for prompt" in reason(total_max_length=6) and "--src" not in reason(
        total_max_length=6
    )
    both = reason(total_max_length=6, src_length=5, min_length=2, max_length=9)
    assert "of which --src_length keeps 5, and --total_max_length is 6" in both and "of --min_length 2" in both
    written(tmp_path / "in", {"src": "x " * 3000})
    assert "the model's context is 2048" in reason(src_length=9999, total_max_length=5000)


class LastFirst:
    """An engine that ends the newest request first, and knows how many it held."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.most, self.submitted = 0, 0

    def submit(self, request: Request) -> None:
        self.waiting.append(request)
        self.submitted += 1
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[Output]:
        return [Output(self.waiting.pop().id, 0, (5,), "x", "length")]


def test_the_input_is_read_only_as_far_as_requests_may_run(tmp_path: Path) -> None:
    data = written(tmp_path / "in", *({"src": f"a{number}"} for number in range(50)))
    engine, made = LastFirst(), prompter(data_file=data, batch_size=4)
    with closing(Progress(0, 50)) as bar:
        found = answers(made, Survey(), engine, bar, Journal(None, {}))  # type: ignore[arg-type]
        numbers = [asked.number for ready in found for asked in ready]
    assert numbers == list(range(1, 51))
    assert engine.most == 4


def test_answers_that_wait_for_an_earlier_one_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindgen.commands.predict.run._MOST_HELD", 10)
    data = written(tmp_path / "in", *({"src": f"a{number}"} for number in range(50)))
    engine, made = LastFirst(), prompter(data_file=data, batch_size=2)
    with closing(Progress(0, 50)) as bar:
        found = answers(made, Survey(), engine, bar, Journal(None, {}))  # type: ignore[arg-type]
        next(ready for ready in found if ready)
    assert engine.submitted == 12


class Failing(LastFirst):
    """An engine whose every answer fails."""

    def abort(self, request_id: int) -> bool:
        self.waiting.clear()
        return True

    def step(self) -> list[Output]:
        return [Output(self.waiting.pop().id, 0, finish_reason="error", message="boom")] if self.waiting else []


def test_an_answer_that_failed_is_said_in_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = written(tmp_path / "in", {"src": "hi"}), tmp_path / "out"
    made = prompter(data_file=data, output_file=str(output))
    assert not predict(made, survey(made, iter(())), Failing())  # type: ignore[arg-type]
    assert json.loads(output.read_text()) == {"src": "hi", "tgt": "", "output": "", "error": "boom"}
    assert "line 1: boom" in capsys.readouterr().err


def test_marks_and_ends_of_lines_of_other_systems_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"src": "hi"}\r\n\r\n{"src": "ho"}')
    numbers = [(line.number, getattr(line, "question", line)) for line in read_lines(str(tmp_path / "in"), 0)]
    assert numbers == [(1, "hi"), (3, "ho")]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"src": "a", "src": "b"}', "src"),
        ('{"src": "a", "src": "a"}', "src"),
        ('{"src": "a", "context": {"system": "b", "system": "c"}}', "system"),
    ],
)
def test_a_line_that_says_a_thing_twice_is_no_good(tmp_path: Path, line: str, key: str) -> None:
    (tmp_path / "in").write_text(line)
    assert list(read_lines(str(tmp_path / "in"), 0)) == [BadLine(1, f"has the key '{key}' twice")]


def test_two_runs_never_write_to_one_file(tmp_path: Path) -> None:
    options = PredictConfig(model_name_or_path="x", output_file=str(tmp_path / "out"), resume=True)
    with closing(OutputFile(options)) as file:
        with pytest.raises(ValueError, match="is being written by another run"):
            OutputFile(options)
        file.write({"src": "é"})
    assert json.loads((tmp_path / "out").read_bytes()) == {"src": "é"}


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_lines_that_came_after_the_check_are_neither_repeated_nor_followed(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    data = written(tmp_path / "in", {"src": "hi"}, {"src": "ho"})
    output = Path(written(tmp_path / "out", *[{"src": "hi", "tgt": "", "output": "x"}] * len(flags)))
    named = ["--model_name_or_path", str(DEMO), "--data_file", data, "--output_file", str(output)]
    job = _prepare([*named, *flags], 0)
    with output.open("ab") as other:
        other.write(json.dumps({"src": "ho", "tgt": "", "output": "y"}).encode() + b"\n")
    before = output.read_bytes()
    with pytest.raises(ValueError, match="has changed since it was checked"):
        _serve(job, Failing())  # type: ignore[arg-type]
    assert output.read_bytes() == before


def test_a_half_line_of_any_length_is_cut_off(tmp_path: Path) -> None:
    options = PredictConfig(model_name_or_path="x", output_file=str(tmp_path / "out"), resume=True)
    for before, after in (
        (b"a\nbc", b"a\n"),
        (b"x" * 200_000, b""),
        (b"a\n" + b"x" * 200_000, b"a\n"),
        (b"a\n", b"a\n"),
    ):
        (tmp_path / "out").write_bytes(before)
        OutputFile(options).close()
        assert (tmp_path / "out").read_bytes() == after


def test_a_disk_that_fills_up_leaves_what_resume_can_continue(tmp_path: Path) -> None:
    options = PredictConfig(model_name_or_path="x", output_file=str(tmp_path / "out"), resume=True)
    record = {"src": "x" * 50}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(OutputFile(options)) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            file.write(record)
            with pytest.raises(
                ValueError, match="cannot be written: .*; its complete lines stay, and --resume goes on"
            ):
                file.write(record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len((tmp_path / "out").read_bytes()) == 100
    OutputFile(options).close()
    assert json.loads((tmp_path / "out").read_bytes()) == record


def room(scheduler: Scheduler, **options: Any) -> None:
    """Whether a benchmark of 100 tokens and 29 more has room in it."""
    config = PredictConfig(model_name_or_path="x", benchmark=True, src_length=100, max_length=29, **options)
    check_room(config, Engine(scheduler, FakeRunner(hashed_logits)))


def test_a_benchmark_that_fits_exactly_is_not_refused() -> None:
    room(Scheduler(BlockPool(2, 64)))
    room(Scheduler(BlockPool(5, 64)), batch_size=2)
    with pytest.raises(ValueError, match="--batch_size 2 takes 5 blocks of 64 tokens at once, but the cache has 4"):
        room(Scheduler(BlockPool(4, 64)), batch_size=2)
    room(Scheduler(BlockPool(3, 16), max_batch_tokens=16, window=16))  # which is all that any layer sees
    room(Scheduler(None, max_batch_tokens=128), batch_size=1)
    room(Scheduler(None, max_batch_tokens=256), batch_size=2)
    room(Scheduler(None, max_batch_tokens=1))  # one alone may be longer than a step
    for batch_size, need in ((2, 256), (3, 384)):
        with pytest.raises(ValueError, match=f"takes up to {need} tokens a step without a cache, but --max-batch-tok"):
            room(Scheduler(None, max_batch_tokens=255), batch_size=batch_size)


def test_a_line_knows_its_turns() -> None:
    assert not Line(1, "a", "", "a").is_chat and Line(1, "a", "", "a", (("b", "c"),)).is_chat
