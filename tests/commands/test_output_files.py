"""Files that commands write: what is there is kept until there is something to put in its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mindgen.__main__ import main
from mindgen.commands.answers import answer
from mindgen.commands.bench.options import BenchConfig
from mindgen.commands.files import check_apart, check_writable
from mindgen.commands.job import Job
from mindgen.commands.options import GenerateConfig
from mindgen.commands.prompts import Prompt
from mindgen.commands.tasks import TASKS

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
BIG = ",".join(str(number) for number in range(5, 605))


def call(capfd: pytest.CaptureFixture[str], command: str, *arguments: str) -> tuple[int, str]:
    """The exit code and standard error of a command on the demo model."""
    code = main([command, "--load", str(DEMO), "--device", "cpu", *arguments])
    return code, capfd.readouterr().err


CACHE = ("--kv-cache-memory", "0.0012", "--block-size", "16")


@pytest.mark.parametrize("tasks", [("greedy_search",), ("greedy_search", "beam_search")])
def test_generate_that_is_refused_keeps_the_output_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, tasks: tuple[str, ...]
) -> None:
    (tmp_path / "out").write_text("old")
    prompts = ("--prompt-ids", "5,6,7", "--prompt-ids", BIG)
    code, err = call(capfd, "generate", *prompts, *CACHE, "--output-file", str(tmp_path / "out"), "--task", *tasks)
    assert code == 2 and f"mindgen: the prompt '{BIG[:57]}...' has 600 prompt tokens" in err
    assert (tmp_path / "out").read_text() == "old"


class Interrupted:
    """An engine whose user presses Ctrl-C before the first answer."""

    def run(self, requests: object) -> object:
        raise KeyboardInterrupt


def test_an_interrupt_before_the_first_answer_keeps_the_output_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    options = GenerateConfig(output_file=str(tmp_path / "out"))
    model = type("Model", (), {"max_positions": 99, "tokenizer": None})()
    with pytest.raises(KeyboardInterrupt):
        answer(Job(model, options, (Prompt("x", (5,)),)), TASKS["greedy"], Interrupted(), True)  # type: ignore[arg-type]
    assert (tmp_path / "out").read_text() == "old"


def test_what_is_refused_after_the_output_file_was_checked_creates_none(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = ("--output-file", str(tmp_path / "out"))
    assert call(capfd, "generate", *named, "--compare-hf", "/nowhere")[0] == 2
    assert call(capfd, "generate", *named, "--prompt-ids", BIG, *CACHE)[0] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spelling", ["./p.txt", "link", "hard", "folder/../p.txt"])
def test_generate_never_overwrites_its_prompts(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("import os\n")
    Path("link").symlink_to("p.txt")
    os.link("p.txt", "hard")
    Path("folder").mkdir()
    flags = ("--prompt-file", "p.txt", "--output-file", spelling, "--max-new-tokens", "1")
    code, err = call(capfd, "generate", *flags)
    assert code == 2 and f"--prompt-file and --output-file are both {spelling}; write to another file" in err
    assert Path("p.txt").read_text() == "import os\n"


def test_a_link_to_the_recorded_tokens_stays_one(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("5,6\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "elsewhere" / "out.csv")
    flags = ("--record_output", str(tmp_path / "link.csv"), "--max_new_tokens", "2", "--load_all_data")
    for _ in ("a link to nothing", "and to a file"):
        assert call(capfd, "engine_test", str(tmp_path / "in.csv"), *flags)[0] == 0
        assert (tmp_path / "link.csv").is_symlink()
        assert len((tmp_path / "elsewhere" / "out.csv").read_text().split(",")) == 2


@pytest.mark.parametrize("name", ["loop", "loop/x"])
def test_recorded_tokens_never_go_to_a_link_onto_itself(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "in.csv").write_text("5,6\n")
    (tmp_path / "loop").symlink_to("loop")
    code, err = call(capfd, "engine_test", str(tmp_path / "in.csv"), "--record_output", str(tmp_path / name))
    assert code == 2 and f"mindgen: --record_output {tmp_path}/{name} " in err and "Traceback" not in err
    assert (tmp_path / "loop").is_symlink()


def test_bench_writes_no_file_over_another(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text")
    for options in (
        BenchConfig(json=str(tmp_path / "x.png"), plot=f"{tmp_path}/./x.png"),
        BenchConfig(json=str(tmp_path / "text"), text_file=str(tmp_path / "text")),
    ):
        with pytest.raises(ValueError, match="are both .*; write to another file"):
            options.check_files()
    BenchConfig(json=str(tmp_path / "x.json"), plot=str(tmp_path / "x.png")).check_files()
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_check_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    check_writable("--x", str(tmp_path / "new"))
    check_apart(
        "--x", str(tmp_path / "new"), {"--y": None, "--z": str(tmp_path / "other"), "--loop": f"{tmp_path}/loop"}
    )
    for name in ("nowhere/x", ".", "loop"):
        with pytest.raises(ValueError, match="--x .* cannot be written"):
            check_writable("--x", str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
