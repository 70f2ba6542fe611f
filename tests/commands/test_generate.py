"""`mindgen generate` on one rank, as a user calls it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mindgen.__main__ import main

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
ANSWER = "I am fine, thank you! How can I help you today?\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `mindgen generate` on the demo model: exit code, standard output, standard error."""

    def call(*arguments: str, load: Path = DEMO) -> tuple[int, str, str]:
        code = main(["generate", "--load", str(load), "--device", "cpu", *arguments])
        return code, *capfd.readouterr()

    return call


def test_text_alone_goes_to_standard_output(run: Run) -> None:
    code, out, err = run("--hf-chat-template")
    assert (code, out) == (0, ANSWER)
    assert "Greedy Search" in err and "how are you?" in err and "cache: " in err


@pytest.mark.parametrize("task", ["greedy", "greedy_search_with_sampling", "beam_search", "beam_search_with_sampling"])
def test_streamed_text_is_the_same(run: Run, task: str) -> None:
    options = (
        "--task",
        task,
        "--prompt",
        "def add(a, b):",
        "--prompt",
        "class A",
        "--seed",
        "5",
        "--max-new-tokens",
        "12",
    )
    whole, streamed = run(*options), run(*options, "--stream")
    assert whole[:2] == streamed[:2]
    assert len(whole[1]) > 10
    assert ("one piece" in streamed[2]) == ("beam" in task)


def test_several_tasks_run_in_turn(run: Run) -> None:
    _, out, err = run("--hf-chat-template", "--task", "greedy_search", "beam_search")
    assert out.startswith(ANSWER) and len(out) > len(ANSWER)
    assert err.index("Greedy Search") < err.index("Beam Search")


def test_the_recomputing_twin_gives_the_same(run: Run) -> None:
    assert run("--hf-chat-template", "--no-use-kv-cache")[:2] == (0, ANSWER)


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_every_attention_backend_gives_the_same(run: Run, attention: str) -> None:
    assert run("--hf-chat-template", "--attention", attention)[:2] == (0, ANSWER)


def test_prompts_from_lines_json_lines_and_standard_input(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines").write_text("import os\n\nimport re\n")
    (tmp_path / "json").write_text('{"prompt": "import os"}\n{"prompt": "import re"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\nimport re\n"))
    limit = ("--max-new-tokens", "6")
    expected = run("--prompt", "import os", "--prompt", "import re", *limit)
    assert expected[0] == 0
    for source in (str(tmp_path / "lines"), str(tmp_path / "json"), "-"):
        assert run("--prompt-file", source, *limit)[:2] == expected[:2]


def test_token_ids_need_no_tokenizer(run: Run, checkpoint: Callable[[str], Path]) -> None:
    code, out, _ = run("--prompt-ids", "5,6,7", "--max-new-tokens", "4", load=checkpoint("llama31"))
    assert code == 0
    assert len(out.strip().split(",")) == 4


def test_the_output_file_has_one_json_line_a_prompt(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    options = ("--prompt", "import os", "--prompt", "import re", "--max-new-tokens", "3", "--logprobs", "2")
    code, out, err = run(*options, "--output-file", str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert code == 0
    assert [line["prompt"] for line in lines] == ["import os", "import re"]
    assert "".join(line["text"] + "\n" for line in lines) == out
    for line in lines:
        assert line["finish_reason"] == "length" and len(line["token_ids"]) == 3
        assert line["num_prompt_tokens"] > 0
        assert [entry["token"] for entry in line["logprobs"]] == line["token_ids"]
        assert all(len(entry["top"]) == 2 and entry["logprob"] <= 0 for entry in line["logprobs"])
    assert "logprob -" in err


def test_several_answers_are_kept_apart(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    options = ("--task", "do_sample", "--num-return-sequences", "3", "--seed", "1", "--max-new-tokens", "8")
    assert run(*options, "--prompt", "x = ", "--output-file", str(file))[0] == 0
    (line,) = map(json.loads, file.read_text().splitlines())
    assert len(line["samples"]) == 3 and line["samples"][0]["text"] == line["text"]
    assert len({sample["text"] for sample in line["samples"]}) > 1


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(run: Run) -> None:
    options = ("--task", "do_sample", "--seed", "3", "--max-new-tokens", "10")
    alone = run(*options, "--prompt", "def main():")[1]
    crowd = run(*options, "--prompt", "import sys", "--prompt", "def main():")[1]
    assert crowd.endswith(alone)
    assert alone != run("--task", "do_sample", "--seed", "4", "--max-new-tokens", "10", "--prompt", "def main():")[1]


def test_the_smaller_limit_wins(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    for limits, expected in (
        (("--max-new-tokens", "3", "--max-length", "50"), 3),
        (("--max-new-tokens", "30", "--max-length", "9"), 6),
    ):
        run("--prompt-ids", "30,40,50", "--ignore-eos", *limits, "--output-file", str(file))
        assert len(json.loads(file.read_text())["token_ids"]) == expected


def test_stop_strings_and_further_end_tokens(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    code, out, _ = run("--hf-chat-template", "--stop", "thank", "--output-file", str(file), "--stream")
    assert (code, out) == (0, "I am fine, \n")
    assert json.loads(file.read_text())["finish_reason"] == "stop"
    whole = run("--hf-chat-template", "--output-file", str(file))
    token = json.loads(file.read_text())["token_ids"][2]
    ended = run("--hf-chat-template", "--add-eos-token", str(token), "--output-file", str(file))
    record = json.loads(file.read_text())
    assert record["finish_reason"] == "eos" and record["token_ids"][-1] == token
    assert whole[1].startswith(ended[1].rstrip("\n")) and whole[1] != ended[1]


def test_an_empty_prompt_is_the_bare_start(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    assert run("--prompt", "", "--max-new-tokens", "2", "--output-file", str(file))[0] == 0
    assert json.loads(file.read_text())["num_prompt_tokens"] == 1


def test_transformers_agrees_and_a_difference_is_found(run: Run, tmp_path: Path) -> None:
    *_, err = run("--hf-chat-template", "--compare-hf", str(DEMO), "--dtype", "fp32")
    assert "mindgen:\nI am fine" in err and "HuggingFace:\nI am fine" in err and "both agree on all" in err
    other = shutil.copytree(DEMO, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 10.0}))
    assert "first difference at token" in run("--hf-chat-template", "--compare-hf", str(other), "--dtype", "fp32")[2]


SCRIPT = """
    --use-mcore-models --use-kv-cache --use-flash-attn --use-fused-swiglu --use-fused-rmsnorm --use-fused-rotary-pos-emb
    --num-layers 5 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --max-position-embeddings 256 --position-embedding-type rope --rotary-base 500
    --rope-scaling-type llama3 --rope-scaling-factor 8.0 --low-freq-factor 1.0 --high-freq-factor 4.0
    --original-max-position-embeddings 32 --norm-epsilon 1e-2 --padded-vocab-size 331 --swiglu --normalization RMSNorm
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-softmax-in-fp32 --seq-length 256
    --micro-batch-size 4 --global-batch-size 16 --tokenizer-not-use-fast --no-load-optim --no-load-rng
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion --exit-on-missing-checkpoint --transformer-impl local
    --make-vocab-size-divisible-by 1 --ckpt-format torch --bf16 --distributed-timeout-minutes 120
""".split()


def test_flags_of_existing_scripts_are_checked_or_have_no_effect(run: Run, checkpoint: Callable[[str], Path]) -> None:
    options = ("--prompt-ids", "5,6,7", "--max-new-tokens", "4")
    code, out, err = run(*options, *SCRIPT, load=checkpoint("llama31"))
    assert code == 0 and out
    assert "no effect here: " in err and "--no-load-optim" in err and "--micro-batch-size" in err
    assert "--swiglu" not in err
    for changed in ("--rotary-base", "--norm-epsilon", "--rope-scaling-factor", "--num-query-groups"):
        at = SCRIPT.index(changed) + 1
        wrong = [*SCRIPT[:at], "3", *SCRIPT[at + 1 :]]
        code, out, err = run(*options, *wrong, load=checkpoint("llama31"))
        assert (code, out) == (2, "") and changed in err


BAD = {
    "an unknown flag": (("--taks", "greedy"), "--taks"),
    "an abbreviated flag": (("--max-new", "3"), "--max-new"),
    "an unknown task": (("--task", "gready"), "'gready'; choose from greedy_search"),
    "a value of another type": (("--top-k", "many"), "--top-k"),
    "a temperature below zero": (("--task", "do_sample", "--temperature", "-1"), "mindgen: --temperature is -1.0"),
    "a temperature that overflows": (("--task", "do_sample", "--temperature", "1e-39"), "temperature is 1e-39"),
    "a penalty that underflows": (("--repetition-penalty", "1e-320"), "--repetition-penalty is 1e-320"),
    "a top-k beyond all numbers": (("--task", "do_sample", "--top-k", "9" * 20), "--top-k is 9"),
    "a chat with several answers": (("--task", "chat", "--num-return-sequences", "2"), "--num-return-sequences"),
    "more answers than sequences": (("--num-return-sequences", "300"), "mindgen: --num-return-sequences is 300"),
    "log-probabilities and beams": (
        ("--task", "beam_search", "--logprobs", "1"),
        "--logprobs is 1, but a beam search reports no log-probabilities of tokens; leave it out\n",
    ),
    "stop strings and beams": (("--task", "beam_search", "--stop", "x"), "--add-eos-token"),
    "a comparison cut by stop strings": (("--compare-hf", str(DEMO), "--stop", "x"), "--stop"),
    "an end token outside the vocabulary": (("--add-eos-token", "5000"), "5000"),
    "a prompt file that never ends": (("--prompt-file", "/dev/zero"), "not a regular file"),
    "an endless cache": (("--kv-cache-memory", "1e300"), "(--kv-cache-memory) is 1e+300"),
    "a full disk": (("--output-file", "/dev/full"), "/dev/full cannot be written"),
    "a temperature that is no number": (("--task", "do_sample", "--temperature", "nan"), "temperature is nan"),
    "a top-p above one": (("--task", "do_sample", "--top-p", "1.5"), "--top-p is 1.5"),
    "no new tokens": (("--max-new-tokens", "0"), "--max-new-tokens"),
    "more answers than beams": (("--task", "beam_search", "--num-return-sequences", "3"), "2 beams"),
    "a prompt longer than the model": (("--prompt", "x " * 3000), "2048"),
    "a prompt as long as the limit": (("--prompt-ids", "3,4,5", "--max-length", "3"), "--max-length is 3"),
    "a foreign token id": (("--prompt-ids", "3,4096"), "4096; the model's are 0 to 4095"),
    "ids that are none": (("--prompt-ids", "3,x"), "'3,x' is not a list of token ids"),
    "a missing prompt file": (("--prompt-file", "/nowhere/x"), "/nowhere/x cannot be read"),
    "an output file nowhere": (("--output-file", "/nowhere/x"), "/nowhere/x cannot be written"),
    "a tokenizer nowhere": (("--tokenizer-name-or-path", "/nowhere"), "/nowhere"),
    "sizes that do not divide": (("--tensor-model-parallel-size", "3"), "8 attention heads are not divisible by 3"),
    "experts that are not there": (
        ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"),
        "expert parallel size 2 does not fit this model on 2 tensor ranks: it has no experts",
    ),
    "more stages than layers": (("--pipeline-model-parallel-size", "9"), "9"),
    "a layer list of another sum": (("--pipeline-model-parallel-size", "2", "--num-layer-list", "3,4"), "8"),
    "another architecture": (("--num-layers", "9"), "--num-layers"),
    "another precision twice": (("--bf16", "--dtype", "fp32"), "--bf16 contradicts --dtype fp32"),
    "flash attention without a cache": (("--use-flash-attn", "--no-use-kv-cache"), "--use-flash-attn"),
    "an unknown end token": (("--add-eos-token", "<|nope|>"), "<|nope|>"),
    "a comparison of samples": (("--task", "do_sample", "--compare-hf", str(DEMO)), "--compare-hf"),
    "a comparison with nothing": (("--compare-hf", "/nowhere"), "/nowhere"),
    "a chat with prompts": (("--task", "chat", "--prompt", "x"), "--task chat"),
    "a device that is not there": (("--device", "npu"), "npu"),
    "no room for a block": (("--kv-cache-memory", "0.00001"), "--kv-cache-memory"),
    "a request larger than the cache": (
        ("--kv-cache-memory", "0.0012", "--max-new-tokens", "2000"),
        "lower --max-new-tokens, shorten the prompt, or raise kv_cache_memory (--kv-",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_message_and_exit_code_2(run: Run, name: str) -> None:
    arguments, expected = BAD[name]
    code, out, err = run("--max-new-tokens", "4", *arguments)
    assert code == 2 and (not out or "/dev/full" in arguments)
    assert expected in err and "Traceback" not in err
    assert sum(line.startswith("mindgen: ") for line in err.splitlines()) == 1


def test_a_folder_without_weights_is_refused_and_never_filled_with_random_ones(run: Run, tmp_path: Path) -> None:
    code, _, err = run(load=tmp_path)
    assert code == 2 and f"{tmp_path} holds no weights" in err
    shutil.copy(DEMO / "config.json", tmp_path)
    assert run(load=tmp_path)[0] == 2


def test_a_missing_tokenizer_is_refused_before_weights_are_read(run: Run, checkpoint: Callable[[str], Path]) -> None:
    code, _, err = run("--prompt", "x", load=checkpoint("qwen3"))
    assert code == 2
    assert "--tokenizer-name-or-path" in err and "--prompt-ids" in err


def changed(folder: Path, target: Path, **fields: object) -> Path:
    """A copy of a Hugging Face folder with other values in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


# Takes away what either version of transformers has written of a rope.
OLD_ROPE = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}
CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "as many layers as nobody has": ({"num_hidden_layers": 2_000_000_000}, "too few for 2000000000 layers"),
    "a size that is text": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "a size below zero": ({"intermediate_size": -96}, "ffn_size is -96"),
    "an epsilon that is no number": ({"rms_norm_eps": float("nan")}, "norm_epsilon is nan"),
    "a tie that is text": ({"tie_word_embeddings": "false"}, "tie_embeddings is 'false'"),
    "a tie that the weights deny": ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    "an unknown activation": ({"hidden_act": "relu6"}, "hidden_act is 'relu6'"),
    "an unknown rope": (OLD_ROPE | {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "'proportional'"),
    "a rope without its factor": (OLD_ROPE | {"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
    "a rope of base one": (OLD_ROPE | {"rope_theta": 1}, "rope_theta is 1"),
    "a window that the family has not": ({"sliding_window": 16}, "sliding_window is 16"),
    "layer types that are a number": ({"layer_types": 5}, "layer_types is 5"),
    "a scale that nobody implements": ({"logit_scale": 0.5}, "logit_scale is 0.5"),
    "a known family, but another": ({"model_type": "qwen2"}, "missing: model.layers.0.self_attn.q_proj.bias"),
    "a context shorter than the prompt": ({"max_position_embeddings": 2}, "max_positions is 2"),
    "another family": ({"model_type": "mamba"}, "docs/adding-a-model.md"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_config_that_is_not_understood_is_refused_by_name(
    run: Run, name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    fields, expected = CONFIGS[name]
    folder = changed(checkpoint("llama31"), tmp_path / "changed", **fields)
    code, out, err = run("--prompt-ids", "5,6", load=folder)
    assert (code, out) == (2, "")
    assert expected in err and "Traceback" not in err


def test_weights_that_are_not_numbers_fail_the_request(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from tests.commands.damage import with_nan

    folder = with_nan(checkpoint("llama31"), tmp_path / "nan", "model.norm.weight")
    code, _, err = run("--prompt-ids", "5,6", load=folder)
    assert code == 1 and "no usable logits" in err


def test_options_that_a_task_does_not_look_at_are_named(run: Run) -> None:
    _, _, err = run("--hf-chat-template", "--temperature", "0.7", "--num-beams", "4")
    assert "no effect with --task greedy_search: --temperature" in err and "--num-beams" in err


def test_lines_are_split_at_newlines_only(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\n', encoding="utf-8")
    _, _, err = run("--prompt-file", str(file), "--max-new-tokens", "1")
    assert err.count("You:") == 2
    file.write_text('{"prompt": "a", "max_new_tokens": 1}\n')
    code, _, err = run("--prompt-file", str(file))
    assert code == 2 and "max_new_tokens" in err


def test_a_weight_file_that_ends_early_is_one_message(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "short")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, err = run(load=folder)
    assert code == 2 and "model.safetensors" in err


def test_help_is_there_and_names_every_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--load", "--tensor-model-parallel-size", "--task", "--stream", "--num-beams", "--compare-hf"):
        assert f"  {flag}" in text
