"""`mindgen engine_test`: token ids in, token ids and latencies out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindgen.__main__ import main
from mindgen.commands.engine_test import EngineTestConfig, EngineTestJob, _serve, _warm_up, figures, write_token_file
from mindgen.commands.latency import Timeline
from mindgen.engine.request import Request, SamplingParams

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
ROWS = ["30,40,50", "1,34,900,77,5", "260"]
GREEDY = ("--do_sample", "false", "--max_new_tokens", "7")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    file = tmp_path / "token_input.csv"
    file.write_text("\r\n".join(ROWS) + "\r\n\r\n")
    return file


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the demo model: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["engine_test", *map(str, arguments), "--load", str(DEMO), "--device", "cpu"])
        return code, *capfd.readouterr()

    return call


def test_the_recorded_tokens_are_those_of_generate_in_order(run: Run, dataset: Path, tmp_path: Path) -> None:
    file, record = tmp_path / "generated.jsonl", tmp_path / "token_output.csv"
    prompts = [part for row in ROWS for part in ("--prompt-ids", row)]
    options = ["--max-new-tokens", "7", "--output-file", str(file), "--device", "cpu"]
    assert main(["generate", "--load", str(DEMO), *prompts, *options]) == 0
    expected = [json.loads(line)["token_ids"] for line in file.read_text().splitlines()]
    for more in ((), ("--max_batch_size", "1"), ("--tensor-model-parallel-size", "2")):
        assert run(dataset, *GREEDY, "--record_output", record, *more)[0] == 0
        assert record.read_bytes().decode() == "".join(",".join(map(str, ids)) + "\r\n" for ids in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "generated.jsonl",
        "token_input.csv",
        "token_output.csv",
    ]


def test_every_figure_has_its_name(run: Run, dataset: Path) -> None:
    code, out, _ = run("--dataset_path", dataset, *GREEDY, "--ignore_eos")
    found = dict(line.split(":", 1) for line in out.splitlines())
    assert code == 0 and found["request_num"] == "3" and found["average_output_length"] == "7.00"
    assert (found["model_name"], found["tp"], found["pp"], found["average_input_length"]) == ("model", "1", "1", "3.00")
    assert all(
        float(found[f"p{part}_lpot"].removesuffix(" ms")) > 0 for part in (10, 20, 30, 40, 50, 60, 80, 90, 95, 99)
    )
    assert {"lpct", "lpot", "pmax_lpot", "p99_first_token", "qps", "qpsPerNpu", "generate speed"} <= set(found)
    assert "nan" not in out


def test_figures_that_nothing_is_known_of_are_dashes(run: Run, dataset: Path) -> None:
    code, out, _ = run(dataset, "--do_sample", "false", "--max_new_tokens", "1")
    assert code == 0 and "\nlpot:-\n" in out and "nan" not in out


def test_tokens_are_drawn_with_a_fixed_seed_unless_greedy(run: Run, dataset: Path, tmp_path: Path) -> None:
    def recorded(*options: str) -> str:
        assert run(dataset, "--max_new_tokens", "12", "--record_output", tmp_path / "out.csv", *options)[0] == 0
        return (tmp_path / "out.csv").read_text()

    drawn = recorded("--temperature", "2")
    assert drawn == recorded("--temperature", "2", "--seed", "0", "--load_all_data")
    assert len({drawn, recorded("--temperature", "2", "--seed", "1"), recorded("--do_sample", "false")}) == 3


def test_figures_by_hand() -> None:
    lines = [
        Timeline(3, 0.0, tokens={0: [(0.1, 1), (0.2, 1), (0.4, 1)]}, end=0.4),
        Timeline(7, 0.0, tokens={0: [(0.3, 1), (0.5, 2)]}, end=0.5),
    ]
    model: Any = SimpleNamespace(
        config=SimpleNamespace(model="/a/tiny", tensor_parallel_size=2, pipeline_parallel_size=1)
    )
    found = figures(lines, model)
    assert found["latency_for_all"] == "500.0000 ms" and found["latency_for_per_infer"] == "450.0000 ms"
    assert found["lpct"] == "40.0000 ms" and found["lpot"] == "125.0000 ms"
    assert found["p50_lpot"] == "100.0000 ms" and found["pmax_lpot"] == "200.0000 ms"
    assert found["average_first_token"] == "200.0000 ms" and found["max_first_token"] == "300.0000 ms"
    assert found["average_last_token"] == "150.0000 ms" and found["max_last_token"] == "200.0000 ms"
    assert found["qps"] == "4.0000 /s" and found["qpsPerNpu"] == "2.0000 /s"
    assert found["generate speed"] == "12.0000 tokens/s"
    lines.append(Timeline(5, 0.0, num_answers=2, tokens={0: [(0.1, 3)], 1: [(0.1, 1)]}, end=0.1))
    found = figures(lines, model)
    assert (found["average_input_length"], found["average_output_length"]) == ("5.00", "2.50")


class Recorder:
    """An engine that only notes what it is asked."""

    has_work = False

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def submit(self, request: Request) -> None:
        self.asked.append(request)

    def abort(self, request_id: int) -> bool:
        self.has_work = False
        return True


def test_the_warm_up_leaves_nothing_in_the_cache_that_the_requests_could_find() -> None:
    requests = tuple(Request(number, (5, 9, number), SamplingParams(max_new_tokens=30)) for number in range(4))
    model: Any = SimpleNamespace(vocab_size=10)
    for options, count in ((EngineTestConfig(warm_up=3), 3), (EngineTestConfig(load_all_data=True), 0)):
        engine: Any = Recorder()
        _warm_up(EngineTestJob(model, options, requests), engine)
        assert len(engine.asked) == count
        for warm, asked in zip(engine.asked, requests, strict=False):
            assert len(warm.prompt) == 3 and warm.prompt[0] != asked.prompt[0] and max(warm.prompt) < 10
            assert warm.params.max_new_tokens == 2


def test_a_file_that_is_not_finished_does_not_appear(tmp_path: Path) -> None:
    def rows() -> Any:
        yield [1, 2]
        raise KeyboardInterrupt

    (tmp_path / "out.csv").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_token_file(tmp_path / "out.csv", rows())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_file_has_the_permissions_of_any_new_one_or_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_token_file(tmp_path / "new", [[1]])
    (tmp_path / "old").touch()
    (tmp_path / "old").chmod(0o604)
    write_token_file(tmp_path / "old", [[1]])
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("any", "new", "old")]
    assert modes[0] == modes[1] != 0o600 and modes[2] == 0o604


class Interrupted(Recorder):
    """An engine whose user presses Ctrl-C."""

    def step(self) -> Any:
        if self.has_work:
            raise KeyboardInterrupt

    def submit(self, request: Request) -> None:
        self.has_work = True


def test_an_interrupt_says_that_nothing_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = SimpleNamespace(vocab_size=10)
    request, engine = Request(0, (5,), SamplingParams()), Interrupted()
    job = EngineTestJob(model, EngineTestConfig(load_all_data=True), (request,), tmp_path / "out.csv")
    with pytest.raises(KeyboardInterrupt):
        _serve(job, engine)  # type: ignore[arg-type]
    assert "interrupted; nothing was written to" in capsys.readouterr().err and not list(tmp_path.iterdir())


LINES = {
    "a word": ("1,2\n3,x,4\n", "line 2: 'x' is not a token id"),
    "a comma too many": ("1,2,\n", "line 1: '' is not a token id"),
    "an empty line in between": ("1\n\n2\n", "line 2: '' is not a token id"),
    "a number below zero": ("1\n-4\n", "line 2: '-4' is not a token id"),
    "a number beyond all": ("9" * 30, "line 1: '999"),
    "a foreign id": ("1\n2\n4096,1\n", "line 3: token id 4096 is outside the vocabulary; the model's are 0 to 4095"),
    "a line as long as the model": ("1\n" + ",".join(["5"] * 2048), "line 2 has 2048 tokens"),
    "nothing": ("\n\n", "holds no request"),
}


@pytest.mark.parametrize("name", list(LINES))
def test_a_bad_line_is_refused_by_its_number(run: Run, tmp_path: Path, name: str) -> None:
    text, expected = LINES[name]
    (tmp_path / "in.csv").write_text(text)
    code, out, err = run(tmp_path / "in.csv", "--record_output", tmp_path / "out.csv")
    assert (code, out) == (2, "") and expected in err and "Traceback" not in err
    assert not (tmp_path / "out.csv").exists()


def test_a_request_that_can_never_fit_is_refused_before_any_is_served(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("5,6,7\n" + ",".join(["5"] * 600))
    cache = ("--kv-cache-memory", "0.0012", "--block-size", "16", "--max_batch_size", "1")
    code, out, err = run(tmp_path / "in.csv", "--load_all_data", *GREEDY, *cache)
    assert (code, out) == (2, "") and "mindgen: line 2 has 600 prompt tokens" in err
    assert "but the cache has 19; lower --max_new_tokens, shorten" in err


def test_a_foreign_token_to_stop_at_is_said_by_its_flag(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("5,6\n")
    code, _, err = run(tmp_path / "in.csv", "--stop_token_ids", "[5000]")
    assert code == 2 and "mindgen: --stop_token_ids of line 1 has token id 5000; the model's vocabulary goes" in err


BAD = {
    "no file": ((), "token_input.csv"),
    "two files": (("a", "--dataset_path", "b"), "leave one out"),
    "a file nowhere": (("/nowhere/in.csv",), "/nowhere/in.csv cannot be read"),
    "a folder": (("/",), "/ is not a regular file"),
    "a configuration file": (("a", "--config_path", "config.json"), "--config_path is not supported"),
    "no tokens": (("a", "--max_new_tokens", "0"), "--max_new_tokens is 0"),
    "a warm-up below none": (("a", "--warm_up", "-1"), "--warm_up is -1"),
    "a device for the tokens": ((DEMO / "config.json", "--record_output", "/dev/null"), "/dev/null is not a regular"),
    "beams that are one": (("a", "--use_beam_search"), "--best_of"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_message_and_exit_code_2(run: Run, name: str) -> None:
    arguments, expected = BAD[name]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and expected in err
    assert sum(line.startswith("mindgen: ") for line in err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--do_sample", "false"), "--do_sample false gives the same answer each time; leave one out"),
        (("--temperature", "0"), "temperature 0 draws the same answer each time; leave one out"),
    ],
)
def test_the_best_of_the_same_answer_is_refused_by_what_was_given(
    run: Run, dataset: Path, options: tuple[str, ...], message: str
) -> None:
    code, out, err = run(dataset, "--best_of", "2", *options)
    assert (code, out) == (2, "") and f"mindgen: --best_of is 2, but {message}\n" in err


def test_the_requests_are_never_overwritten(run: Run, dataset: Path) -> None:
    before = dataset.read_bytes()
    code, _, err = run(dataset, "--record_output", dataset)
    assert code == 2 and "name another one" in err and dataset.read_bytes() == before


def test_an_output_nowhere_is_refused_before_anything_runs(run: Run, dataset: Path) -> None:
    code, out, err = run(dataset, "--record_output", "/nowhere/out.csv")
    assert (
        (code, out) == (2, "") and "--record_output /nowhere/out.csv cannot be written" in err and "cache:" not in err
    )
