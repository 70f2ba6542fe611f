"""What `mindgen predict` keeps of answers that end out of turn, and what it says of those that failed."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mindgen.__main__ import main
from mindgen.commands.predict import journal as journals
from mindgen.commands.predict.data import BUILT_IN_PROMPT
from mindgen.commands.predict.journal import Journal, journal_path, read_journal
from mindgen.commands.predict.output import OutputFile, check_output_file, finished_records
from mindgen.commands.predict.prompts import Prompter
from mindgen.commands.predict.run import predict
from mindgen.commands.predict.survey import survey
from mindgen.engine.request import Output, Request
from tests.commands.test_predict import DEMO, written
from tests.commands.test_predict_parts import prompter

NUM_LINES = 6


class SlowFirst:
    """An engine that answers a prompt with its number, the newest first, and is interrupted after `most` answers."""

    def __init__(self, most: int | None = None) -> None:
        self.asked: list[Request] = []
        self.most, self.served = most, 0

    def submit(self, request: Request) -> None:
        self.asked.append(request)

    def abort(self, request_id: int) -> bool:
        self.asked.clear()
        return True

    def step(self) -> list[Output]:
        if not self.asked:
            return []
        if self.served == self.most:
            raise KeyboardInterrupt
        self.served += 1
        request = self.asked.pop()
        return [Output(request.id, 0, (5,), f"answer {request.id}", "eos")]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return written(tmp_path / "in", *({"src": f"a{number}", "tgt": number * "ü"} for number in range(NUM_LINES)))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begun(data: str, output: Path, **options: Any) -> Prompter:
    """Ready to predict, as far as files are concerned."""
    made = prompter(data_file=data, output_file=str(output), quiet=True, **options)
    check_output_file(made.options)
    return made


def run(made: Prompter, engine: SlowFirst) -> bool:
    found = survey(made, finished_records(made.options))
    return predict(made, found, engine)  # type: ignore[arg-type]


def numbers(output: Path) -> list[str]:
    return [json.loads(line)["output"] for line in output.read_text(encoding="utf-8").splitlines()]


EXPECTED = [f"answer {number}" for number in range(1, NUM_LINES + 1)]


@pytest.mark.parametrize("batch_size", [2, 4, NUM_LINES])
@pytest.mark.parametrize("most", range(NUM_LINES))
def test_nothing_that_was_finished_is_asked_again(data: str, output: Path, batch_size: int, most: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(begun(data, output, batch_size=batch_size), SlowFirst(most))
    engine = SlowFirst()
    assert run(begun(data, output, batch_size=3, resume=True), engine)
    assert numbers(output) == EXPECTED
    assert engine.served == NUM_LINES - most
    assert sorted(path.name for path in output.parent.iterdir()) == ["in", "out"]


def test_an_interrupted_run_can_be_interrupted_again(data: str, output: Path) -> None:
    for _ in range(NUM_LINES - 1):
        with pytest.raises(KeyboardInterrupt):
            run(begun(data, output, batch_size=NUM_LINES, resume=True), SlowFirst(1))
    assert run(begun(data, output, resume=True), SlowFirst(1))
    assert numbers(output) == EXPECTED


def test_what_the_journal_answers_takes_no_place_in_the_batch(data: str, output: Path) -> None:
    together: list[int] = []

    class Counting(SlowFirst):
        def step(self) -> list[Output]:
            together.extend([len(self.asked)] * bool(self.asked))
            return super().step()

    left_by(data, output)  # the last four
    more = written(output.parent / "more", *({"src": f"a{number}", "tgt": number * "ü"} for number in range(8)))
    engine = Counting()
    assert run(begun(more, output, batch_size=4, resume=True), engine)
    assert engine.served == 4 and together == [4, 3, 2, 1]
    assert numbers(output) == [f"answer {number}" for number in range(1, 9)]


def left_by(data: str, output: Path) -> Path:
    """The journal of a run that answered all lines but the first two."""
    with pytest.raises(KeyboardInterrupt):
        run(begun(data, output, batch_size=NUM_LINES), SlowFirst(NUM_LINES - 2))
    path = journal_path(str(output))
    assert path is not None and path.name == "out.journal" and not output.read_bytes()
    return path


def test_a_kill_at_any_byte_of_the_journal_loses_only_the_line_in_writing(data: str, output: Path) -> None:
    whole = left_by(data, output).read_bytes()
    for end in (1, len(whole) // 2, len(whole) - 1, whole.index(b"\n") + 1, len(whole)):
        output.unlink(missing_ok=True)
        (output.parent / "out.journal").write_bytes(whole[:end])
        (output.parent / "out.journal.new").write_bytes(whole[: end // 2])  # cut off while it was written anew
        engine = SlowFirst()
        assert run(begun(data, output, resume=True), engine)
        assert numbers(output) == EXPECTED and engine.served == NUM_LINES - whole[:end].count(b"\n")
        assert sorted(path.name for path in output.parent.iterdir()) == ["in", "out"]


def test_what_the_output_holds_already_is_not_taken_from_the_journal_again(data: str, output: Path) -> None:
    journal = left_by(data, output)
    kept = journal.read_bytes()
    assert run(begun(data, output, resume=True), SlowFirst())
    journal.write_bytes(kept)  # killed between the last line and the end of the journal
    engine = SlowFirst()
    assert run(begun(data, output, resume=True), engine)
    assert numbers(output) == EXPECTED and not engine.served and not journal.exists()


def test_a_journal_that_is_left_is_never_lost_unasked(data: str, output: Path) -> None:
    journal = left_by(data, output)
    before = journal.read_bytes()
    for removed in (False, True):
        if removed:
            output.unlink()
        with pytest.raises(ValueError, match=r"out.journal, beside .* holds something already; continue it with --res"):
            begun(data, output)
    other = written(output.parent / "other", *({"src": f"b{number}"} for number in range(NUM_LINES)))
    short = written(output.parent / "short", {"src": "a0", "tgt": ""})
    for name, reason in ((other, "does not belong to line 3 of"), (short, "answers line 3, which .*short has not")):
        with pytest.raises(ValueError, match=reason):
            run(begun(name, output, resume=True), SlowFirst())
    assert journal.read_bytes() == before
    engine = SlowFirst()
    assert run(begun(data, output, overwrite=True), engine)
    assert engine.served == NUM_LINES and not journal.exists()


@pytest.mark.parametrize("name", ["out.journal", "out.journal.new"])
@pytest.mark.parametrize("line", [b"[1]\n", b"\x00\n", b'{"src": "a0", "tgt": "", "output": ""}\n'])
def test_a_journal_that_is_none_is_refused_without_a_word_of_the_output_file(
    data: str, output: Path, line: bytes, name: str
) -> None:
    (output.parent / name).write_bytes(line)
    with pytest.raises(ValueError, match=f"{name} was not written by predict; remove it or move it away, and only"):
        run(begun(data, output, resume=True), SlowFirst())
    assert (output.parent / name).read_bytes() == line


@pytest.mark.parametrize("name", ["out.journal", "out.journal.new"])
def test_the_input_is_never_taken_for_a_journal(tmp_path: Path, name: str) -> None:
    data = written(tmp_path / name, {"src": "hi"})
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match="--data_file and the journal of --output_file are both"):
            begun(data, tmp_path / "out", **flags)


@pytest.mark.parametrize("name", ["out.journal", "out.journal.new"])
def test_nothing_by_the_name_of_a_journal_is_lost_unasked(data: str, output: Path, name: str) -> None:
    (output.parent / name).write_text("precious")
    with pytest.raises(ValueError, match=f"{name}, beside --output_file, holds something already"):
        begun(data, output, batch_size=NUM_LINES)
    assert (output.parent / name).read_text() == "precious"


@pytest.mark.parametrize("name", ["out.journal", "out.journal.new"])
def test_a_folder_by_the_name_of_a_journal_is_refused_before_any_work(data: str, output: Path, name: str) -> None:
    (output.parent / name).mkdir()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=f"{name}, where answers wait beside --output_file, is no regular file"):
            begun(data, output, **flags)


def test_a_file_that_comes_by_the_name_of_a_journal_meanwhile_stays(tmp_path: Path) -> None:
    beside = tmp_path / "out.journal.new"
    with closing(Journal(tmp_path / "out.journal", {})) as journal:
        beside.write_text("precious")
        with pytest.raises(ValueError, match="out.journal cannot be written: File exists"):
            journal.add(1, {"src": "", "tgt": "", "output": ""})
        journal.drop(1)
    assert beside.read_text() == "precious"


def test_a_journal_that_another_run_wrote_meanwhile_is_left_alone(data: str, output: Path) -> None:
    made = begun(data, output)
    found = survey(made, finished_records(made.options))
    journal = left_by(data, output)
    before = journal.read_bytes()
    with pytest.raises(ValueError, match="has changed since it was checked"):
        predict(made, found, SlowFirst())  # type: ignore[arg-type]
    assert journal.read_bytes() == before


@pytest.mark.parametrize("name", ["out.journal", "out.journal.new"])
def test_what_came_by_the_name_of_a_journal_after_the_check_is_left_alone(data: str, output: Path, name: str) -> None:
    made = begun(data, output)
    found = survey(made, finished_records(made.options))
    (output.parent / name).write_text("precious")
    with pytest.raises(ValueError, match="has changed since it was checked"):
        predict(made, found, SlowFirst())  # type: ignore[arg-type]
    assert (output.parent / name).read_text() == "precious"


def test_more_output_than_the_built_in_prompt_is_said_in_words(output: Path) -> None:
    line = {"src": BUILT_IN_PROMPT, "tgt": "", "output": ""}
    written(output, line, line)
    made = prompter(output_file=str(output), resume=True)
    with pytest.raises(ValueError, match="holds more lines than the built-in prompt has"):
        survey(made, finished_records(made.options))


def test_a_journal_does_not_grow_with_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_SPENT", 10)
    path, most = tmp_path / "out.journal", 0
    with closing(Journal(path, {})) as journal:
        for number in range(500):
            journal.add(number, {"src": "", "tgt": "", "output": ""})
            if number >= 5:
                journal.drop(number - 5)
            most = max(most, path.read_bytes().count(b"\n"))
    assert 5 < most <= 2 * 6 + 11
    assert set(range(495, 500)) <= set(read_journal(str(tmp_path / "out")))


def test_an_output_that_is_no_file_has_no_journal(data: str) -> None:
    assert journal_path("/dev/null") is None
    assert run(begun(data, Path("/dev/null"), batch_size=4), SlowFirst())


def test_a_pipe_has_no_journal(data: str) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as end:
        try:
            assert journal_path(f"/dev/fd/{writer}") is None
            assert run(begun(data, Path(f"/dev/fd/{writer}"), batch_size=4), SlowFirst())
        finally:
            os.close(writer)
        assert [json.loads(line)["output"] for line in end] == EXPECTED


class Failing(SlowFirst):
    """An engine at which the even prompts fail."""

    def step(self) -> list[Output]:
        return [
            output if output.request_id % 2 else Output(output.request_id, 0, finish_reason="error", message="boom")
            for output in super().step()
        ]


@pytest.mark.parametrize("most", [NUM_LINES - 1, 2])
def test_failures_are_said_and_counted_also_when_quiet_and_resumed(
    data: str, output: Path, capsys: pytest.CaptureFixture[str], most: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(begun(data, output, batch_size=NUM_LINES), Failing(most))
    for _ in range(2):
        assert not run(begun(data, output, resume=True), Failing()), "an old error counts"
    heard = capsys.readouterr()
    assert heard.out == "" and all(f"mindgen: line {number}: boom" in heard.err for number in (2, 4, 6))
    assert heard.err.count('answers that failed, whose lines have an "error": 3') == 2
    errors = [json.loads(line).get("error") for line in output.read_text(encoding="utf-8").splitlines()]
    assert errors == [None, "boom"] * 3


def test_a_finished_file_with_an_error_is_exit_code_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "in", {"src": "hi"})
    output = written(tmp_path / "out", {"src": "hi", "tgt": "", "output": "", "error": "boom"})
    flags = ["--data_file", data, "--output_file", output, "--max_length", "2", "--quiet", "--resume"]
    assert main(["predict", "--model_name_or_path", str(DEMO), "--device", "cpu", *flags]) == 1
    assert 'whose lines have an "error": 1' in capfd.readouterr().err


def test_a_file_that_is_begun_anew_is_rid_of_the_journal_first(data: str, output: Path) -> None:
    journal = left_by(data, output)
    with closing(OutputFile(begun(data, output, overwrite=True).options)):
        assert not journal.exists()  # a kill from here on leaves nothing of the old run to a resumed one


def test_options_name_one_journal_however_the_output_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    (tmp_path / "link").symlink_to("out")
    assert journal_path(str(tmp_path / "link")) == journal_path(f"{tmp_path}/./out") == tmp_path / "out.journal"
