"""`mindgen run_generator` on one rank and under torchrun, as a script for MindIE calls it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from math import isnan, nan
from pathlib import Path

import pytest

from mindgen.__main__ import main
from mindgen.commands.flags import from_flags
from mindgen.commands.mindie.options import GeneratorConfig, engine_config
from mindgen.commands.mindie.plugins import read_plugin_params
from mindgen.commands.run_generator import parser
from mindgen.config import EngineConfig

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "model"
ANSWER = "I am fine, thank you! How can I help you today?"
CHAT = ("--is_chat_model", "--input_texts", "how are you?")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the demo model: exit code, standard output, standard error."""

    def call(*arguments: str, load: Path = DEMO) -> tuple[int, str, str]:
        code = main(["run_generator", "--model_path", str(load), "--device", "cpu", *arguments])
        return code, *capfd.readouterr()

    return call


def generated(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    """What `generate` gives for the same, one record a prompt."""
    file = tmp_path / "generated.jsonl"
    assert main(["generate", "--load", str(DEMO), "--device", "cpu", "--output-file", str(file), *arguments]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def answers(out: str) -> list[str]:
    """The answers in order, of any length in lines."""
    return re.findall(r"^Answer\S*: (.*?)\nGenerate\[", out, re.DOTALL | re.MULTILINE)


def row(out: str) -> list[float]:
    """The row of the table."""
    heading, _, cells = [line for line in out.splitlines() if line.startswith("|")]
    assert "time to first token (ms)" in heading and "time per token (ms)" in heading and "tokens/s" in heading
    return [nan if cell.strip() == "-" else float(cell) for cell in cells.strip("| ").split("|")]


def test_questions_answers_counts_and_a_table(run: Run) -> None:
    code, out, _ = run(*CHAT, "what is 2 + 2?")
    assert code == 0
    assert out.startswith(
        f"Question[0]: how are you?\nAnswer[0]: {ANSWER}\nGenerate[0] token num: (0, 20)\nQuestion[1]"
    )
    requests, batch, _, output, first, gap, total, speed = row(out)
    num_new = sum(int(count) for count in re.findall(r"token num: \(\d+, (\d+)\)", out))
    assert (requests, batch, output) == (2, 2, num_new / 2)
    assert 0 < first < total and 0 < gap < total and speed > 0


def test_the_tokens_are_those_of_generate(run: Run, tmp_path: Path) -> None:
    texts = ("import os", "def add(a, b):", "class A")
    records = generated(tmp_path, *(part for text in texts for part in ("--prompt", text)), "--max-new-tokens", "9")
    code, out, _ = run("--input_texts", *texts, "--max_output_length", "9", "--max_batch_size", "2")
    assert code == 0 and answers(out) == [record["text"] for record in records]
    assert row(out)[:2] == [3, 2]


def test_without_a_tokenizer_all_is_token_ids(run: Run, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    (tmp_path / "ids.csv").write_text("5,6,7\r\n8, 9\r\n")
    options = ("--load_tokenizer", "false", "--max_output_length", "4")
    code, out, _ = run("--input_ids", "5,6,7", "8,9", *options, load=checkpoint("llama31"))
    assert code == 0 and "Question[0]: 5,6,7\n" in out and "Question[1]: 8,9\n" in out
    assert all(len(answer.split(",")) == 4 for answer in answers(out)) and len(answers(out)) == 2
    again = run("--input_file", str(tmp_path / "ids.csv"), *options, load=checkpoint("llama31"))
    assert answers(again[1]) == answers(out)


def test_files_hold_texts_or_conversations(run: Run, tmp_path: Path) -> None:
    expected = run("--input_texts", "import os", "import re")[1]
    for text in ("import os\n\nimport re\n", '"import os"\n{"prompt": "import re"}\n'):
        (tmp_path / "prompts").write_text(text)
        assert answers(run("--input_file", str(tmp_path / "prompts"))[1]) == answers(expected)
    said = [{"role": "user", "content": "how are you?"}]
    (tmp_path / "prompts").write_text(json.dumps(said) + "\n" + json.dumps({"messages": said}) + "\n")
    _, out, _ = run("--input_file", str(tmp_path / "prompts"), "--is_chat_model")
    assert answers(out) == [ANSWER, ANSWER] and "Question[1]: how are you?" in out


def test_a_tokenizer_can_be_elsewhere(run: Run, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    code, _, err = run(*CHAT, load=tmp_path)
    assert code == 2 and "--tokenizer-name-or-path" in err
    assert answers(run(*CHAT, "--tokenizer-name-or-path", str(DEMO), load=tmp_path)[1]) == [ANSWER]


def test_a_chat_template_can_be_given(run: Run, tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    plain = answers(run("--input_texts", "import os")[1])
    for given in (template, str(tmp_path / "chat.jinja")):
        _, out, _ = run("--is_chat_model", "--input_texts", "import os", "--chat_template", given)
        assert answers(out) == plain


def test_a_single_prompt_fills_the_batch_whose_size_is_said(run: Run) -> None:
    _, out, err = run(*CHAT, "--max_batch_size", "3")
    assert answers(out) == [ANSWER] * 3 and "asked --max_batch_size 3 times" in err


def test_sampling_needs_post_processing(run: Run, tmp_path: Path) -> None:
    sampling = ("--temperature", "1.5", "--top_k", "20", "--seed", "7")
    plain = run("--input_texts", "x = ", "--max_output_length", "12")
    code, out, err = run("--input_texts", "x = ", "--max_output_length", "12", *sampling)
    assert code == 0 and answers(out) == answers(plain[1])
    assert "no effect without --do_post_process: --temperature, --top_k, --seed" in err
    _, drawn, err = run("--input_texts", "x = ", "--max_output_length", "12", *sampling, "--do_post_process")
    flags = ("--task", "do_sample", "--temperature", "1.5", "--top-k", "20", "--seed", "7", "--max-new-tokens", "12")
    assert answers(drawn) == [generated(tmp_path, "--prompt", "x = ", *flags)[0]["text"]] != answers(plain[1])
    assert "no effect" not in err
    _, out, err = run("--input_texts", "x = ", *sampling, "--do_post_process", "--do_sample", "false")
    assert "no effect beside the other flags: --temperature, --top_k" in err


def test_several_answers_and_log_probabilities(run: Run) -> None:
    several = ("--do_post_process", "--temperature", "1", "--param_n", "2", "--top_logprobs", "2")
    _, out, _ = run("--input_texts", "x = ", *several, "--max_output_length", "3")
    assert all(f"{name}[0][{index}]: " in out for name in ("Answer", "Logprobs", "TopLogprobs") for index in (0, 1))
    (output, *_, speed), counts = row(out)[3:], re.findall(r"token num: \(0, (\d+)\)", out)
    assert (output, counts) == (3, ["3", "3"]) and speed == pytest.approx(1000 * 6 / row(out)[6], rel=0.01)


def test_a_beam_search(run: Run, tmp_path: Path) -> None:
    beams = ("--task", "beam_search", "--num-beams", "3", "--max-new-tokens", "8")
    expected = generated(tmp_path, "--prompt", "class A", *beams)[0]["text"]
    options = ("--do_post_process", "--use_beam_search", "--best_of", "3", "--max_output_length", "8")
    out = run("--input_texts", "class A", *options)[1]
    assert answers(out) == [expected]
    assert isnan(row(out)[5]) and "nan" not in out  # all tokens come together


def test_limits_and_ends_are_honoured(run: Run, tmp_path: Path) -> None:
    def count(*options: str) -> int:
        code, out, _ = run(*CHAT, *options)
        assert code == 0
        return int(re.findall(r"token num: \(0, (\d+)\)", out)[0])

    assert count("--max_output_length", "5") == 5
    assert count("--max_output_length", "15", "--max_new_tokens", "4") == 4
    assert count("--max_position_embeddings", "20") < 20
    assert count("--max_output_length", "30", "--ignore_eos") == 30
    tokens = generated(tmp_path, "--prompt", "how are you?", "--hf-chat-template")[0]["token_ids"]
    assert isinstance(tokens, list)
    assert count("--eos_token_id", str(tokens[3])) == 4
    assert count("--stop_token_ids", f"[{tokens[2]}]") == 3
    _, out, _ = run(*CHAT, "--stop_strings", '["thank"]')
    assert answers(out) == ["I am fine, "]


def test_cache_size_block_size_and_chunks_are_the_engine_s(run: Run) -> None:
    cache = ("--npu_mem", "0.25", "--block_size", "64")
    plugins = ("--plugin_params", '{"plugin_type": "prefix_cache,splitfuse"}', "--split_chunk_tokens", "7")
    code, out, err = run(*CHAT, *cache, *plugins)
    assert (code, answers(out)) == (0, [ANSWER])
    assert "blocks of 64 = " in err and "0.25 GiB a rank" in err
    assert "plugin prefix_cache: " in err and "plugin splitfuse: " in err


def test_a_request_that_can_never_fit_is_refused_before_any_is_answered(run: Run) -> None:
    cache = ("--npu_mem", "0.0012", "--block_size", "16", "--max_batch_size", "1")
    code, out, err = run("--input_ids", "5,6,7", ",".join(["5"] * 600), *cache)
    assert (code, out) == (2, "")
    assert "mindgen: the prompt '5,5,5,5," in err and "...' has 600 prompt tokens" in err
    assert "but the cache has 19; lower --max_output_length, shorten the prompt, or raise --npu_mem (--kv-" in err


def test_a_foreign_token_to_stop_at_is_said_by_its_flag(run: Run) -> None:
    code, _, err = run("--input_ids", "5,6", "--stop_token_ids", "[5000]")
    assert code == 2 and "mindgen: --stop_token_ids of the prompt '5,6' has token id 5000; the model's vocabu" in err


def test_the_table_counts_those_that_really_ran_together(run: Run) -> None:
    cache = ("--npu_mem", "0.00026", "--block_size", "16", "--max_output_length", "30")
    _, out, err = run("--input_ids", "5,6,7", "5,6", "9,10", "11,12", *cache, "--ignore_eos")
    assert "cache: 4 blocks of 16" in err  # each starts with one, and one more is kept free for each that runs
    assert row(out)[:2] == [4, 2]
    _, out, _ = run("--input_ids", "5,6,7", "5,6", "9,10", "--max_output_length", "1")
    assert row(out)[:2] == [3, 3], "those that a step ends ran together in it"


def test_mindie_s_names_become_the_engine_s_configuration() -> None:
    def made(*arguments: str) -> EngineConfig:
        parsed = parser().parse_args(["--model_path", "x", *arguments])
        options = from_flags(GeneratorConfig, parsed)
        return engine_config(options, parsed, read_plugin_params(options.plugin_params))

    config = made("--max_prefill_tokens", "16", "--tp", "2", "--npu_mem", "3", "--block_size", "32")
    assert config == EngineConfig("x", tensor_parallel_size=2, max_batch_tokens=16, kv_cache_memory=3.0, block_size=32)
    chunked = made("--plugin_params", '{"plugin_type": "splitfuse"}', "--split_chunk_tokens", "7")
    assert chunked == EngineConfig("x", max_batch_tokens=7)
    assert made("--split_chunk_tokens", "1", "--npu_mem", "-1") == EngineConfig("x")


BAD = {
    "an unknown flag": (("--max_length", "3"), "--max_length"),
    "no model": (("--model_path", ""), "--model_path"),
    "an unsupported plugin": (("--plugin_params", '{"plugin_type": "memory_decoding"}'), "prefix_cache, splitfuse"),
    "a plugin switched off": (
        ("--plugin_params", '{"plugin_type": "prefix_cache"}', "--no-prefix-reuse"),
        "prefix_cache contradicts --no-prefix-reuse",
    ),
    "a gamma without a plugin": (("--speculation_gamma", "4"), "--speculation_gamma is 4"),
    "guesses without a plugin": (("--num_speculative_tokens", "1"), "--num_speculative_tokens is 1"),
    "chunks without a plugin": (("--split_chunk_tokens", "16"), "splitfuse"),
    "two budgets": (("--max_prefill_tokens", "16", "--max-batch-tokens", "17"), "--max_prefill_tokens 16 contradicts"),
    "two caches": (("--npu_mem", "1", "--kv-cache-memory", "2"), "--npu_mem 1.0 contradicts"),
    "two sizes": (("--tp", "2", "--tensor-model-parallel-size", "1"), "--tp 2 contradicts"),
    "two sources": (("--input_ids", "1,2", "--input_texts", "x"), "--input_texts and --input_ids"),
    "adapters": (("--input_dict", "[]"), "--input_dict is not supported"),
    "copies": (("--dp", "2"), "--dp is 2"),
    "experts": (("--moe_ep", "4"), "expert parallel size 4"),
    "a cache and a share": (
        ("--npu_mem", "1", "--kv-cache-fraction", "0.5"),
        "kv_cache_fraction (--kv-cache-fraction) 0.5 and --npu_mem 1.0 both say",
    ),
    "the engine's cache and a share": (
        ("--kv-cache-memory", "1", "--kv-cache-fraction", "0.5"),
        "0.5 and kv_cache_memory (--kv-cache-memory) 1.0 both say",
    ),
    "a cache beyond all sizes": (("--npu_mem", "2e9"), "mindgen: --npu_mem is 2000000000.0; it must be"),
    "no cache at all": (("--npu_mem", "0"), "--npu_mem is 0.0"),
    "a block too large": (("--block_size", "2048"), "--block_size is 2048; it must be 1 to 1024"),
    "a batch of none": (("--max_batch_size", "0"), "--max_batch_size is 0"),
    "a context of one": (("--max_position_embeddings", "1"), "--max_position_embeddings is 1"),
    "a long prompt": (("--input_texts", "x " * 40, "--max_input_length", "30"), "--max_input_length 30"),
    "no room": (("--input_ids", "5,6,7", "--max_position_embeddings", "3"), "may have 3"),
    "a foreign id": (("--input_ids", "5,4096"), "token id 4096"),
    "an id that is none": (("--input_ids", "5,x"), "--input_ids: 'x' is not a token id"),
    "texts without a tokenizer": (("--load_tokenizer", "false"), "--load_tokenizer false needs token ids"),
    "a template without chat": (("--chat_template", "x"), "--is_chat_model"),
    "a template nowhere": (("--is_chat_model", "--chat_template", "/nowhere/x"), "/nowhere/x cannot be read"),
    "a template that fails": (
        ("--is_chat_model", "--chat_template", "{{ 1/0 }}"),
        "the chat template of --chat_template failed: ZeroDivisionError",
    ),
    "a filter out of range": (("--do_post_process", "--top_k", "-2"), "mindgen: --top_k is -2; "),
    "more answers than any request": (("--do_post_process", "--param_n", "300"), "mindgen: --param_n is 300; "),
    "a tokenizer nowhere": (("--tokenizer-name-or-path", "/nowhere"), "`generate` also takes --tokenizer-model"),
    "a file nowhere": (("--input_file", "/nowhere/x"), "/nowhere/x cannot be read"),
    "an end token outside": (("--eos_token_id", "5000"), "--eos_token_id 5000"),
    "an end token that is none": (("--eos_token_id", "two"), "--eos_token_id two is not a JSON list"),
    "stop strings that are numbers": (("--stop_strings", "[1]"), "--stop_strings [1]"),
    "several answers without processing": (("--param_n", "2"), "--do_post_process"),
    "fewer draws than answers": (("--do_post_process", "--param_n", "3", "--best_of", "2"), "--best_of is 2"),
    "beams and their log-probabilities": (
        ("--do_post_process", "--use_beam_search", "--best_of", "2", "--logprobs"),
        "no log-probabilities of tokens; leave out --logprobs\n",
    ),
    "beams and those of other tokens": (
        ("--do_post_process", "--use_beam_search", "--best_of", "2", "--top_logprobs", "1"),
        "no log-probabilities of tokens; leave out --top_logprobs\n",
    ),
    "the best of answers that nothing says to draw": (
        ("--do_post_process", "--best_of", "2"),
        "--best_of is 2, but no flag says to draw answers; add --do_sample",
    ),
    "one beam": (("--do_post_process", "--use_beam_search"), "--use_beam_search needs at least 2"),
    "a top-p above one": (("--do_post_process", "--top_p", "1.5"), "top_p is 1.5"),
    "the stop string in the text": (("--include_stop_str_in_output",), "--include_stop_str_in_output"),
    "special tokens in the text": (("--skip_special_tokens", "false"), "--skip_special_tokens"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_message_and_exit_code_2(run: Run, name: str) -> None:
    arguments, expected = BAD[name]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert expected in err and "Traceback" not in err
    assert sum(line.startswith("mindgen: ") for line in err.splitlines()) == 1


FILES = {
    "a conversation for a plain model": ('[{"role": "user", "content": "x"}]', (), "line 1 is a conversation"),
    "a line of another kind": ('"x"\n\n[3]', (), "line 3 must be a text"),
    "an object of another kind": ('{"text": "x"}', (), "line 1 must be a text"),
    "a message without content": (
        '"x"\n[{"role": "user"}]',
        ("--is_chat_model",),
        "prompts, line 2: the chat template",
    ),
    "a message that is none": ('[{"content": "x"}]', ("--is_chat_model",), "prompts, line 1: message 0"),
    "half a character": ('"\\ud800"', (), "prompts, line 1: the text has a lone surrogate"),
    "an empty file": ("\n", (), "holds no request"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_bad_file_is_refused_with_the_line(run: Run, tmp_path: Path, name: str) -> None:
    text, options, expected = FILES[name]
    (tmp_path / "prompts").write_text(text)
    code, out, err = run("--input_file", str(tmp_path / "prompts"), *options)
    assert (code, out) == (2, "") and expected in err


def test_what_has_no_effect_is_said_by_name(run: Run) -> None:
    automatic = ("--npu_mem", "-1", "--tp", "-1", "--dp", "-1", "--moe_ep", "1")
    code, _, err = run(*CHAT, *automatic, "--backend_type", "atb", "--trust_remote_code")
    assert code == 0 and "no effect here: --backend_type, --trust_remote_code" in err


def test_under_torchrun_all_ranks_share_the_layers() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "mindgen", "run_generator", "--model_path", str(DEMO)]
    done = subprocess.run([*command, "--device", "cpu", *CHAT], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert answers(done.stdout) == [ANSWER]
