"""`mindgen bench`, as a user calls it: exact token counts, stable names, transformers beside it. No clock is judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mindgen.__main__ import main
from mindgen.commands.bench import parser
from mindgen.commands.bench.job import prepare
from mindgen.commands.bench.rival_config import find_config
from mindgen.weights.open import open_source
from mindgen.weights.source import Source

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "model"
RATE = {"median", "min", "max", "runs"}
BOUNDED = RATE | {"bound", "bound_by", "share", "flop_per_byte", "gflop_per_s"}
LATENCY = {"p50", "p90", "p99"}
RESULT = {"kind", "input_len", "output_len", "rates", "time_to_first_token_s", "inter_token_latency_s"}
RESULT |= {"read_gb_per_s", "scheduler"}
Bench = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command in fp32: what it wrote to --json, and what it printed."""

    def call(*arguments: str) -> tuple[dict[str, Any], str]:
        file = tmp_path / "bench.json"
        code = main(["bench", "--device", "cpu", "--dtype", "fp32", "--json", str(file), *arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(file.read_text()), out

    return call


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_a_grid_is_measured_with_exact_lengths_and_stable_names(
    bench: Bench, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plot = tmp_path / "bench.png"
    grid = ("--batch-size", "1,3", "--input-len", "20", "--output-len", "1,6", "--repeats", "2", "--block-size", "8")
    report, text = bench("--load", str(checkpoint("llama31")), *grid, "--plot", str(plot))
    assert set(report) == {"format", "arguments", "host", "model", "run", "memory", "probes", "results"}
    assert set(report["probes"]["before"]) == {"read_gb_per_s", "matrix_gflop_per_s"} == set(report["probes"]["after"])
    (rank,) = report["memory"]["ranks"]
    held = {"rss_bytes", "anonymous_bytes"}
    assert set(rank) == held | {f"loaded_{name}" for name in held} | {"loaded_peak_rss_bytes"}
    assert rank["loaded_peak_rss_bytes"] >= rank["loaded_rss_bytes"] >= rank["loaded_anonymous_bytes"] > 0
    assert report["memory"]["num_ranks_not_seen"] == 0
    points = [(entry["batch_size"], entry["input_len"], entry["output_len"]) for entry in report["results"]]
    assert points == [(1, 20, 1), (1, 20, 6), (3, 20, 1), (3, 20, 6)]
    for entry in report["results"]:
        check_point(entry)
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and plot.stat().st_size > 10_000
    assert "batch 3, 20 tokens in, 6 out" in text and text.count("share") >= 8


def check_point(entry: dict[str, Any]) -> None:
    """Two runs of one grid point."""
    several = entry["output_len"] > 1
    assert set(entry) == RESULT | {"batch_size"}
    assert set(entry["rates"]) == {"prefill_tokens_per_s"} | ({"decode_tokens_per_s"} if several else set())
    for rate in entry["rates"].values():
        assert set(rate) == BOUNDED and len(rate["runs"]) == 2
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert rate["share"] == pytest.approx(rate["median"] / rate["bound"])
    assert set(entry["time_to_first_token_s"]) == LATENCY | {"bound", "share"}
    assert set(entry["inter_token_latency_s"]) == LATENCY | ({"bound", "share"} if several else set())
    assert (entry["inter_token_latency_s"]["p50"] is not None) == several
    assert len(entry["read_gb_per_s"]) == 2
    computed = 2 * entry["batch_size"] * (entry["input_len"] + entry["output_len"] - 1)
    assert entry["scheduler"] == {"num_computed_tokens": computed, "num_reused_tokens": 0, "num_preemptions": 0}
    assert all(number >= 0 for number in numbers(entry))


def test_transformers_generates_the_same_tokens(bench: Bench, checkpoint: Callable[[str], Path]) -> None:
    grid = ("--batch-size", "1,3", "--input-len", "20", "--output-len", "6", "--repeats", "2", "--warmup", "0")
    report, text = bench("--load", str(checkpoint("qwen3")), *grid, "--vs", "hf")
    for entry in report["results"]:
        found = entry["hf"]
        assert found["answers"] == 2 * entry["batch_size"] == found["answers_with_the_same_tokens"]
        assert found["tokens_before_a_difference"] == found["tokens"] == 6 * found["answers"]
        assert set(found["rates"]) == set(found["ratios"]) == {"prefill_tokens_per_s", "decode_tokens_per_s"}
        for name, ratio in found["ratios"].items():
            pairs = zip(entry["rates"][name]["runs"], found["rates"][name]["runs"], strict=True)
            assert ratio["runs"] == pytest.approx([ours / theirs for ours, theirs in pairs])
    assert "all tokens are the same in 6 of 6 answers" in text
    assert "transformers" in report["host"]


def test_a_serving_mix_is_measured_against_one_padded_batch(bench: Bench, checkpoint: Callable[[str], Path]) -> None:
    mix = ("--request-rate", "inf", "--num-requests", "7", "--input-len", "3-30", "--output-len", "2-9")
    report, text = bench("--load", str(checkpoint("llama2")), *mix, "--repeats", "1", "--vs", "hf")
    (entry,) = report["results"]
    assert set(entry) == RESULT | {"request_rate", "num_requests", "hf"}
    assert set(entry["rates"]) == {"requests_per_s", "output_tokens_per_s"}
    assert (entry["request_rate"], entry["input_len"], entry["output_len"]) == ("inf", "3-30", "2-9")
    first = entry["time_to_first_token_s"]
    assert first["p50"] == first["p99"]  # all of them are in the first step, also with a cache made to measure
    assert entry["hf"]["answers"] == 7 == entry["hf"]["answers_with_the_same_tokens"]
    assert "7 requests, inf a second, 3-30 tokens in, 2-9 out" in text


def test_requests_of_a_given_text_arrive_over_time(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("import os\n\n\ndef main() -> None:\n    print(os.getcwd())\n")
    mix = ("--request-rate", "1000", "--num-requests", "4", "--input-len", "10", "--output-len", "40")
    report, _ = bench("--load", str(DEMO), *mix, "--repeats", "1", "--text-file", str(tmp_path / "text"))
    (entry,) = report["results"]
    assert entry["request_rate"] == 1000
    assert entry["scheduler"]["num_computed_tokens"] == 4 * (10 + 40 - 1)  # no end of text ended any


@pytest.fixture
def shape(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with nothing but a config.json, of a model with tied embeddings and biases."""
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text((checkpoint("qwen2") / "config.json").read_text())
    return folder


def test_random_weights_make_a_model_that_ranks_and_transformers_agree_on(shape: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    grid = ("--batch-size", "2", "--input-len", "20", "--output-len", "5", "--repeats", "1", "--warmup", "0")
    command = [sys.executable, "-m", "mindgen", "bench", "--random-weights", str(shape), "--device", "cpu", *grid]
    command += ["--dtype", "fp32", "--vs", "hf", "--json", str(file), "--tensor-model-parallel-size", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["results"][0]["hf"]["answers_with_the_same_tokens"] == 2
    assert len(report["memory"]["ranks"]) == 2 == report["run"]["tensor_parallel_size"]


ENDS = {"eos_token_id": list(range(331))}


def test_transformers_makes_models_of_every_kind_of_config(
    bench: Bench, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Lists in it, words of its own, a file in which every token is an end of text."""
    experts = json.loads((checkpoint("qwen3_moe") / "config.json").read_text()) | {"decoder_sparse_step": 1}
    (tmp_path / "experts.json").write_text(json.dumps(experts))
    shutil.copytree(checkpoint("gpt2"), tmp_path / "gpt2")
    ends = json.loads((checkpoint("gpt2") / "config.json").read_text()) | ENDS
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(ends))
    sources = [("--load", str(checkpoint(name))) for name in ("phi35", "bloom")]
    sources += [("--load", str(tmp_path / "gpt2")), ("--random-weights", str(tmp_path / "gpt2"))]
    sources += [("--random-weights", str(tmp_path / "experts.json"))]
    for source in sources:
        grid = ("--batch-size", "2", "--input-len", "20", "--output-len", "5", "--repeats", "1", "--warmup", "0")
        report, _ = bench(*source, *grid, "--vs", "hf")
        (entry,) = report["results"]
        assert entry["hf"]["answers_with_the_same_tokens"] == 2, source
        assert entry["hf"]["tokens_before_a_difference"] == 2 * 5


@pytest.mark.parametrize("name", ["baichuan", "chatglm", "internlm2", "qwen"])
def test_a_model_that_transformers_has_not_is_refused_before_weights_are_read(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    arguments = ["--load", str(checkpoint(name)), "--input-len", "16", "--output-len", "4", "--vs", "hf"]
    with pytest.raises(ValueError, match=f"^--vs hf: transformers has no {name}; leave it out$"):
        prepare(parser().parse_args(arguments), arguments, 0)


def test_which_models_transformers_has_is_known_without_loading_it() -> None:
    code = """
import sys
from mindgen.commands.bench.rival_config import is_known
from mindgen.weights.families import FAMILIES, model_type_of
known = {name: is_known(name) for name in map(model_type_of, FAMILIES)}
assert "transformers" not in sys.modules
from transformers import CONFIG_MAPPING
assert known == {name: name in CONFIG_MAPPING for name in known}, known
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_config_that_transformers_needs_and_that_is_not_there_is_asked_for(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(checkpoint("bloom"))
    moved = SimpleNamespace(spec=source.spec, path=tmp_path, text_folders=(tmp_path,))
    with pytest.raises(ValueError, match="needs the config.json of a bloom model, .* put it there, or leave out"):
        find_config(cast(Source, moved), None)


BAD = {
    "no model": ((), "--random-weights"),
    "two models": (("--load", str(DEMO), "--random-weights", "tinyllama-1.1b"), "leave out --load"),
    "an unknown shape": (("--random-weights", "gpt-9"), "known are tinyllama-1.1b"),
    "a batch of none": (("--load", str(DEMO), "--batch-size", "2,0"), "--batch-size is 0"),
    "a length of none": (("--load", str(DEMO), "--input-len", "0"), "--input-len '0'"),
    "a length that is none": (("--load", str(DEMO), "--output-len", "many"), "--output-len 'many'"),
    "a span that goes down": (("--load", str(DEMO), "--request-rate", "1", "--input-len", "9-3"), "--input-len '9-3'"),
    "a span in a grid": (("--load", str(DEMO), "--input-len", "3-9"), "--request-rate"),
    "no repeats": (("--load", str(DEMO), "--repeats", "0"), "--repeats is 0"),
    "a rate of nothing": (("--load", str(DEMO), "--request-rate", "0"), "--request-rate is 0.0"),
    "a rate that is no number": (("--load", str(DEMO), "--request-rate", "nan"), "--request-rate is nan"),
    "a rate and a grid": (("--load", str(DEMO), "--request-rate", "1", "--batch-size", "2"), "--num-requests"),
    "a padded batch over time": (("--load", str(DEMO), "--request-rate", "1", "--vs", "hf"), "--request-rate inf"),
    "more than the context": (("--load", str(DEMO), "--input-len", "2048"), "2112 tokens"),
    "no cache": (("--load", str(DEMO), "--no-use-kv-cache"), "--no-use-kv-cache"),
    "a cache too small": (("--load", str(DEMO), "--batch-size", "8", "--kv-cache-memory", "0.003"), "3072 tokens"),
    "a batch too large": (("--load", str(DEMO), "--batch-size", "300"), "--batch-size is 300"),
    "requests of a grid": (("--load", str(DEMO), "--num-requests", "9"), "--num-requests 9 needs --request-rate"),
    "a text of nothing": (("--load", str(DEMO), "--text-file", os.devnull), "/dev/null is not a regular file"),
    "a text nowhere": (("--load", str(DEMO), "--text-file", "/nowhere/x"), "--text-file /nowhere/x cannot be read"),
    "a text of a shape": (("--random-weights", "tinyllama-1.1b", "--text-file", __file__), "tokenizer"),
    "an output nowhere": (("--load", str(DEMO), "--json", "/nowhere/x"), "--json /nowhere/x cannot be written"),
    "a picture nowhere": (("--load", str(DEMO), "--plot", "/nowhere/x.png"), "--plot /nowhere/x.png cannot be written"),
    "a picture of another kind": (
        ("--load", str(DEMO), "--plot", "x.jpg"),
        "--plot x.jpg has another suffix than .png",
    ),
    "another rival": (("--load", str(DEMO), "--vs", "tf"), "--vs"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_message_and_exit_code_2(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD[name]
    code = main(["bench", "--device", "cpu", *arguments])
    out, err = capfd.readouterr()
    assert code == 2 and not out
    assert expected in err and "Traceback" not in err
    assert sum(line.startswith("mindgen: ") for line in err.splitlines()) == 1


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_text_of_nothing_is_refused(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(text)
    assert main(["bench", "--load", str(DEMO), "--device", "cpu", "--text-file", str(tmp_path / "text")]) == 2
    assert "holds no text" in capfd.readouterr().err


def test_a_batch_too_large_is_refused_before_weights_are_read() -> None:
    arguments = ["--load", str(DEMO), "--batch-size", "300"]
    with pytest.raises(ValueError, match="at most 256 sequences run together"):
        prepare(parser().parse_args(arguments), arguments, 0)


def test_a_plot_without_matplotlib_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mindgen.commands.bench.options.find_spec", lambda name: None)
    assert main(["bench", "--load", str(DEMO), "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'mindgen[bench]'" in capfd.readouterr().err
