"""`mindgen predict` on one rank, as a user of PaddleNLP's predictor calls it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindgen.__main__ import main
from mindgen.commands.predict.flags import parser, read_flags

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
ANSWER = "I am fine, thank you! How can I help you today?"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mindgen predict` on the demo model, in a folder of its own: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, load: Path = DEMO) -> tuple[int, str, str]:
        code = main(["predict", "--model_name_or_path", str(load), "--device", "cpu", *arguments])
        return code, *capfd.readouterr()

    return call


def written(path: Path, *lines: Any) -> str:
    """A file of JSON lines; what is bytes stands there as it is."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return str(path)


def records(name: str = "output.json") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_lines_come_out_in_the_order_of_the_input(run: Run, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"src": "def add(a, b):", "tgt": "ü"},
        {"src": "how are you?"},
        {"src": ["how are you?", "what is your name?"], "tgt": [ANSWER]},
        {"src": ["how are you?"], "tgt": ["fine"]},
    ]
    code, out, err = run("--data_file", written(tmp_path / "in", *lines), "--batch_size", "3", "--max_length", "30")
    found = records()
    assert code == 0
    assert [(line["src"], line["tgt"]) for line in found] == [(line["src"], line.get("tgt", "")) for line in lines]
    assert all(list(line) == ["src", "tgt", "output"] for line in found)
    assert [found[1]["output"], found[3]["output"]] == [ANSWER, ANSWER]
    assert "no name" in found[2]["output"]
    assert "ü" in Path("output.json").read_text(encoding="utf-8")
    assert out.count("***Source***") == out.count("***Target***") == out.count("***Output***") == 4
    assert f"***********Output**********\n{ANSWER}\n" in out
    assert "4 lines" in err and "tokens/s" in err


def test_greedy_and_the_default_of_top_k_1_give_what_generate_gives(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = ("def add(a, b):", "class Point:")
    data = written(tmp_path / "in", *({"src": prompt} for prompt in prompts))
    flags = ("--data_file", data, "--chat_template", "none", "--max_length", "16", "--quiet")
    code, _, err = run(*flags, "--decode_strategy", "greedy_search", "--output_file", "greedy", "--mode", "static")
    assert code == 0 and "\ngraphs: none are captured: a CPU has none\n" in err
    assert run(*flags, "--output_file", "default", "--batch_size", "2")[:2] == (0, "")
    assert (
        main(["generate", "--load", str(DEMO), "--device", "cpu", "--max-new-tokens", "16", "--prompt", prompts[0]])
        == 0
    )
    assert capfd.readouterr().out == records("greedy")[0]["output"] + "\n"
    assert records("greedy") == records("default")


def test_every_strategy_answers_and_a_seed_repeats_it(run: Run, tmp_path: Path) -> None:
    data = written(tmp_path / "in", *[{"src": "x = "}] * 3)
    flags = ("--data_file", data, "--chat_template", "none", "--max_length", "8", "--quiet", "--dtype", "float32")
    free = (*flags, "--top_k", "0", "--seed", "5")
    assert run(*free, "--output_file", "a")[0] == run(*free, "--output_file", "b", "--batch_size", "3")[0] == 0
    assert records("a") == records("b")
    assert len({line["output"] for line in records("a")}) > 1, "equal lines must not share their draws"
    assert run(*flags, "--output_file", "c", "--decode_strategy", "beam_search", "--num_beams", "3")[0] == 0
    assert len({line["output"] for line in records("c")}) == 1


def test_without_a_data_file_the_built_in_prompt_is_answered(run: Run) -> None:
    assert run("--max_length", "4", "--batch_size", "2")[0] == 0
    assert [line["src"] for line in records()] == ["解释一下温故而知新"] * 2


def test_lengths_are_limited(run: Run, tmp_path: Path) -> None:
    data = written(tmp_path / "in", {"src": "a b c d e f g h i j k l m n o p"})
    flags = ("--data_file", data, "--chat_template", "none", "--overwrite", "--dtype", "float32")
    assert run(*flags, "--max_length", "6")[0] == 0
    whole = records()[0]["output"]
    _, _, err = run(*flags, "--max_length", "6", "--src_length", "5")
    assert "which lose their beginning: 1" in err and records()[0]["output"] != whole
    assert run(*flags, "--max_length", "99", "--src_length", "5", "--total_max_length", "7")[0] == 0
    short = records()[0]["output"]
    assert run(*flags, "--max_length", "2", "--src_length", "5")[0] == 0
    assert records()[0]["output"] == short
    assert (
        run(
            "--data_file",
            written(tmp_path / "in", {"src": "how are you?"}),
            "--overwrite",
            "--min_length",
            "30",
            "--max_length",
            "40",
        )[0]
        == 0
    )
    assert len(records()[0]["output"]) > len(ANSWER)


BAD_LINES = {
    "is not JSON": b'{"src": ',
    "is not a JSON object": b"[1]",
    'has no "src"': {"tgt": "x"},
    "must be a text": {"src": 5},
    "is empty": {"src": []},
    "it has 0": {"src": ["a", "b"], "tgt": []},
    '"context" must be': {"src": "a", "context": "x"},
    "only": {"src": "a", "context": {"tone": "kind"}},
    "is not UTF-8": b'{"src": "\xff"}',
    "lone surrogate": b'{"src": "\\ud800"}',
    "nested": b'{"src": ' + b"[" * 100_000,
    "no room for an answer": {"src": "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4},
}


def test_bad_lines_are_reported_by_number_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    good = [{"src": "how are you?"}, {"src": "hi"}]
    data = written(tmp_path / "in", good[0], *BAD_LINES.values(), b"", good[1])
    flags = ("--data_file", data, "--total_max_length", "40", "--max_length", "30")
    code, out, err = run(*flags)
    assert (code, out) == (2, "") and not Path("output.json").exists()
    assert f"that cannot be used: {len(BAD_LINES)};" in err and "--skip_bad_lines" in err
    for number, reason in enumerate(list(BAD_LINES)[:10], 2):
        line = next(line for line in err.splitlines() if line.startswith(f"line {number} "))
        assert reason in line or reason == "nested", line
    assert "and 2 more" in err and "Traceback" not in err
    assert run(*flags, "--skip_bad_lines", "--quiet")[0] == 0
    assert [line["src"] for line in records()] == ["how are you?", "hi"]
    whole = Path("output.json").read_bytes()
    Path("output.json").write_bytes(whole.splitlines(keepends=True)[0])
    assert run(*flags, "--skip_bad_lines", "1", "--resume")[0] == 0
    assert Path("output.json").read_bytes() == whole


def test_a_run_is_resumed_behind_its_last_whole_line(run: Run, tmp_path: Path) -> None:
    data = written(tmp_path / "in", *({"src": f"def f{n}():", "tgt": n * "y"} for n in range(4)))
    flags = ("--data_file", data, "--max_length", "6", "--quiet", "--dtype", "float32")
    assert run(*flags, "--batch_size", "4")[0] == 0
    whole = Path("output.json").read_bytes()
    lines = whole.splitlines(keepends=True)
    for left in (b"", lines[0], lines[0] + lines[1] + lines[2][:9], whole, whole[:-1]):
        Path("output.json").write_bytes(left)
        code, _, err = run(*flags, "--resume")
        assert (code, Path("output.json").read_bytes()) == (0, whole)
        assert (f"{left.count(10)} of 4 lines are in output.json already" in err) == (left.count(10) > 0)


def test_with_beams_the_line_that_takes_the_most_blocks_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path
) -> None:
    data = written(tmp_path / "in", {"src": "a b " * 40}, {"src": "x " * 4})  # the first is longer, and has less room
    beams = "--chat_template none --decode_strategy beam_search --num_beams 4 --max_length 100 --total_max_length 128"
    code, out, err = run("--data_file", data, *beams.split(), "--block_size", "4", "--kv-cache-memory", "0.00123")
    assert (code, out) == (2, "") and "mindgen: line 2 has " in err and "in 4 beams" in err
    assert "; lower --max_length or --num_beams, shorten the prompt" in err
    assert not Path("output.json").exists()


def test_output_that_is_there_is_never_lost_unasked(run: Run, tmp_path: Path) -> None:
    data = written(tmp_path / "in", {"src": "hi"})
    flags = ("--data_file", data, "--max_length", "3", "--quiet")
    cases = {
        "holds something already": ("", {"src": "hi", "tgt": "", "output": "x"}),
        "does not belong to line 1": ("--resume", {"src": "ho", "tgt": "", "output": "x"}),
        "does not belong": ("--resume", {"src": "hi", "tgt": "y", "output": "x"}),
        "was not written by predict": ("--resume", {"prompt": "hi"}),
        "not written by predict": ("--resume", b"\x00\x00"),
        "give one of them": ("--resume --overwrite", {"src": "hi", "tgt": "", "output": "x"}),
    }
    for reason, (flag, record) in cases.items():
        before = Path(written(tmp_path / "output.json", record)).read_bytes()
        code, _, err = run(*flags, *flag.split())
        assert code == 2 and reason in err, reason
        assert Path("output.json").read_bytes() == before
    written(tmp_path / "output.json", *[{"src": "hi", "tgt": "", "output": "x"}] * 2)
    assert "holds more lines than" in run(*flags, "--resume")[2]
    assert run(*flags, "--overwrite", "True")[0] == 0 and len(records()) == 1


def test_a_file_too_large_to_be_checked_early_is_checked_all_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindgen.commands.predict._QUICKLY_READ", 0)
    data = written(tmp_path / "in", {"src": "how are you?"}, b"nonsense")
    code, out, err = run("--data_file", data, "--max_length", "4")
    assert (code, out) == (2, "") and "line 2 is not JSON" in err and not Path("output.json").exists()
    code, out, err = run("--data_file", data, "--max_length", "4", "--skip_bad_lines")
    assert code == 0 and "line 2 is not JSON" in err and len(records()) == 1


def test_a_terminal_gets_a_progress_bar_with_tokens_per_second(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", (terminal := Terminal()))
    data = written(tmp_path / "in", {"src": "how are you?"}, {"src": "hi"})
    code, out, _ = run("--data_file", data, "--max_length", "4")
    assert code == 0 and out.count("***Output***") == 2
    assert "2/2" in terminal.getvalue() and "tokens/s]" in terminal.getvalue()


class Terminal(io.StringIO):
    """A standard error that a person watches."""

    def isatty(self) -> bool:
        return True


def test_the_benchmark_prints_paddlenlps_line_with_the_length_forced(run: Run) -> None:
    flags = "--benchmark --src_length 24 --max_length 9 --batch_size 2 --benchmark_warmup 1 --benchmark_repeats 3"
    code, out, _ = run(*flags.split(), "--decode_strategy", "greedy_search")
    assert code == 0 and not Path("output.json").exists()
    assert re.search(r"^Avg Elapse time is: [\d.e-]+$", out, re.MULTILINE)
    assert "\nOutput tokens is: 54\n" in out
    line = r"Input length is: 24, Output length is: 9, bs is: 2, IPS: ([\d.]+) tokens/s, QPS: ([\d.]+) requests/s\.\n"
    found = re.search(line, out)
    assert found and float(found[1]) == pytest.approx(9 * float(found[2]), rel=0.01)
    assert "Time to first token: p50" in out and "Time between tokens: p50" in out


def test_the_benchmark_follows_the_prediction(run: Run, tmp_path: Path) -> None:
    data = written(tmp_path / "in", {"src": "how are you?"})
    flags = "--benchmark 1 --src_length 8 --max_length 2 --benchmark_warmup 0 --benchmark_repeats 1"
    code, out, _ = run("--data_file", data, *flags.split())
    assert code == 0 and len(records()) == 1
    assert out.index("***Output***") < out.index("IPS: ")


BAD: dict[str, tuple[str, str]] = {
    "no file": ("--data_file nowhere", "nowhere does not exist"),
    "an endless file": ("--data_file /dev/zero", "/dev/zero is not a regular file"),
    "an empty file": ("--data_file empty", "holds nothing to answer"),
    "a file onto itself": ("--data_file good --output_file good", "write to another file"),
    "a folder": ("--output_file .", "cannot be written"),
    "a folder nowhere": ("--output_file nowhere/x", "nowhere/x cannot be written: No such file"),
    "a filter out of range": ("--top_k -1", "mindgen: --top_k is -1; "),
    "a seed below zero": ("--seed -1", "mindgen: --seed is -1; "),
    "more beams than any request": (
        "--decode_strategy beam_search --num_beams 257",
        "mindgen: --num_beams is 257; ",
    ),
    "a full disk": ("--data_file good --output_file /dev/full", "/dev/full cannot be written"),
    "a template nowhere": ("--chat_template nowhere", "--chat_template nowhere"),
    "a benchmark beyond the model": (
        "--benchmark --src_length 2000 --max_length 1024",
        "2000 and --max_length 1024 together, 3024",
    ),
    "a request beyond the cache": (
        "--data_file good --kv-cache-memory 0.0012 --max_length 2000",
        "but the cache has 4; lower --max_length, shorten",
    ),
    "a benchmark of more than run at once": (
        "--benchmark --batch_size 300",
        "--batch_size is 300, but at most 256 sequences run together",
    ),
    "a benchmark of more beams": (
        "--benchmark --batch_size 100 --decode_strategy beam_search --num_beams 3",
        "--batch_size is 100 in 3 beams, but at most 256",
    ),
    "a benchmark beyond the cache": (
        "--data_file good --benchmark --batch_size 3 --src_length 64 --kv-cache-memory 0.0012",
        "--batch_size 3 takes 6 blocks of 64 tokens at once, but the cache has 4",
    ),
    "a benchmark beyond a step without a cache": (
        "--benchmark --batch_size 2 --src_length 64 --no-use-kv-cache --max-batch-tokens 133",
        "--batch_size 2 takes up to 134 tokens a step without a cache, but --max-batch-tokens is 133",
    ),
    "a filter out of range that has no effect": ("--decode_strategy greedy_search --top_p 7", "mindgen: --top_p is 7"),
    "a temperature out of range beside it": ("--decode_strategy beam_search --temperature -3", "--temperature is -3"),
    "beams that are not searched": ("--num_beams 257", "mindgen: --num_beams is 257; "),
    "a penalty without beams": ("--length_penalty nan", "mindgen: --length_penalty is nan; "),
    "no size": ("--batch_size 0", "--batch_size is 0"),
    "a minimum above the maximum": ("--min_length 5 --max_length 4", "--min_length is 5"),
    "another strategy": ("--decode_strategy greedy", "'sampling', 'greedy_search', 'beam_search'"),
    "another device": ("--device xpu", "xpu"),
    "no truth": ("--block_attn maybe", "neither True nor False"),
    "a flag of generate": ("--max-new-tokens 4", "--max-new-tokens"),
    "quantisation": ("--quant_type weight_only_int8", "--quant_type: mindgen does not quantise yet"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_message_and_exit_code_2(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").write_text("\n")
    written(tmp_path / "good", {"src": "hi"})
    flags, expected = BAD[name]
    code, _, err = run("--max_length", "4", *flags.split())
    assert code == 2
    assert expected in err and "Traceback" not in err
    assert sum(line.startswith("mindgen: ") for line in err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "good"]


def test_flags_that_a_strategy_does_not_look_at_are_named() -> None:
    model = ["--model_name_or_path", "x", "--decode_strategy"]
    filters, beams = ["--top_k", "5", "--top_p", "0.5", "--temperature", "2"], ["--num_beams", "4"]
    _, _, notes = read_flags([*model, "greedy_search", *filters, *beams])
    assert notes == ["no effect with --decode_strategy greedy_search: --top_k, --top_p, --temperature, --num_beams"]
    assert read_flags([*model, "beam_search", *filters, *beams])[2] == [
        "no effect with --decode_strategy beam_search: --top_k, --top_p, --temperature"
    ]
    assert not read_flags([*model, "sampling", *filters])[2] and not read_flags([*model, "beam_search", *beams])[2]


REFUSED = """
    quant_type cachekv_int8_type weight_block_size lora_path prefix_path speculate_method draft_model_name_or_path
    avx_model avx_type model_type total_request_num
""".split()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_yet_is_refused_by_name_and_not_advertised(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}: "):
        read_flags(["--model_name_or_path", "x", f"--{name}", "a8w8"])
    read_flags(["--model_name_or_path", "x", f"--{name}", "None"])
    assert f"--{name}" not in parser().format_help()


def test_switches_are_given_in_three_ways_and_told_what_they_mean() -> None:
    model = ["--model_name_or_path", "x"]
    for value in ([], ["1"], ["True"], ["true"]):
        _, options, notes = read_flags([*model, "--block_attn", *value, "--inference_model", *value])
        assert options.block_attn and options.inference_model and not notes
    config, options, notes = read_flags([*model, "--block_attn", "0", "--mode", "static", "--append_attn"])
    assert not options.block_attn and (config.block_size, config.device) == (64, "auto")
    assert len(notes) == 2 and "--append_attn" in notes[0] and "paged" in notes[1]
    assert config.capture_graphs and not read_flags(model)[0].capture_graphs
    config, _, _ = read_flags([*model, "--device", "gpu", "--dtype", "bfloat16", "--block_size", "32"])
    assert (config.device, config.dtype, config.block_size) == ("cuda", "bf16", 32)
    assert "PaddleNLP's code" in parser().format_help()


def test_help_has_one_line_of_each_configuration_and_says_what_becomes_of_lists() -> None:
    shown = parser().format_help()
    assert "\nHow to run it: over how many ranks, on which device, with how much memory:\n  --" in shown
    assert "without a chat template    without a chat template" in shown and "A list is kept" not in shown
