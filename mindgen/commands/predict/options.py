"""The options of `predict`, by PaddleNLP's names; its flags come from these fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mindgen.commands.flags import by_flags
from mindgen.config import option
from mindgen.engine.request import SamplingParams, derive_seed

STRATEGIES = ("sampling", "greedy_search", "beam_search")
DEVICES = {"auto": "auto", "gpu": "cuda", "cuda": "cuda", "npu": "npu", "cpu": "cpu"}
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}

DIFFERENCES = """\
Where PaddleNLP's code differed from its tutorial, and what holds here:
  flag                 tutorial              PaddleNLP's code           here
  --top_k              1                     0                          1
  --top_p              1.0                   0.7                        1.0
  --temperature        1.0                   0.95                       1.0
  --src_length         1024                  1024, later the rest of    1024, tokens of the prompt
                                             --total_max_length
  --max_length         2048, with the input  1024 new tokens            1024 new tokens
  --total_max_length   -                     8192, later 4096           what the model can take
  --min_length         -                     1 new token                0: an answer may be empty
  --dtype              has to be given       has to be given            as the weights are stored
  --top_k with         used                  ignored                    used
    --inference_model
  --repetition_penalty -                     ignored without            used
                                             --block_attn
  --benchmark          forces --max_length   only without --block_attn  forces it always
  src is a list        -                     its first text only,       chat turns: refused
                                             without a chat template    without a chat template
  tgt in the output,   -                     ""                         the list, as it came
    where src is one
"""
# What options of SamplingParams are called here.
FLAGS = {"max_new_tokens": "--max_length", "min_new_tokens": "--min_length", "num_beams": "--num_beams"}
_CHOICES = {"sampling": ("top_k", "top_p", "temperature"), "beam_search": ("num_beams", "length_penalty")}


def _flag(default: Any, name: str, help: str, *others: str, **more: Any) -> Any:
    return option(default, help, f"--{name}", *others, **more)


def _switch(name: str, help: str) -> Any:
    return option(False, help, f"--{name}", style="truth")


@dataclass(frozen=True)
class PredictConfig:
    """What to predict, by PaddleNLP's names. The defaults are those of its tutorial, --max_length and --dtype aside."""

    model_name_or_path: str = _flag(
        "", "model_name_or_path", "a Hugging Face folder or a Megatron directory of any TP x PP"
    )
    data_file: str | None = _flag(
        None,
        "data_file",
        'JSON lines {"src", "tgt"}; lists are chat turns, for a chat template (default: a built-in prompt)',
    )
    output_file: str = _flag("output.json", "output_file", 'gets a JSON line {"src", "tgt", "output"} for each input')
    batch_size: int = _flag(
        1, "batch_size", "how many requests run at once at most; a finished one is replaced at once, nothing is padded"
    )
    src_length: int = _flag(1024, "src_length", "tokens of a prompt; a longer one loses its beginning")
    max_length: int = _flag(1024, "max_length", "the most new tokens")
    min_length: int = _flag(0, "min_length", "the fewest new tokens")
    total_max_length: int | None = _flag(
        None, "total_max_length", "the most tokens of prompt and answer together (default: the model's context)"
    )
    decode_strategy: str = _flag("sampling", "decode_strategy", "how tokens are chosen", choices=STRATEGIES)
    top_k: int = _flag(1, "top_k", "sample from the k most probable tokens; 0 is all; 1 leaves no choice")
    top_p: float = _flag(1.0, "top_p", "sample from the most probable tokens that reach this probability; 1 is all")
    temperature: float = _flag(1.0, "temperature", "divides the logits when sampling; 0 is greedy")
    repetition_penalty: float = _flag(1.0, "repetition_penalty", "above 1 makes tokens that were seen less probable")
    num_beams: int = _flag(2, "num_beams", "beams of beam_search")
    length_penalty: float = _flag(
        1.0, "length_penalty", "beams are ranked by log-probability / length ** length_penalty"
    )
    seed: int | None = _flag(None, "seed", "the same seed gives every line the same tokens (default: new ones)")
    device: str = _flag("auto", "device", "where to compute; gpu is cuda", choices=tuple(DEVICES))
    dtype: str | None = _flag(
        None, "dtype", "precision of weights and computation (default: as stored)", choices=tuple(DTYPES)
    )
    mode: str = _flag(
        "dynamic", "mode", "static asks for captured graphs, where the device has them", choices=("dynamic", "static")
    )
    inference_model: bool = _switch("inference_model", "always on: there is one implementation of each model")
    block_attn: bool = _switch("block_attn", "always on: the cache is paged")
    block_size: int = _flag(64, "block_size", "tokens of one cache block", "--block-size")
    chat_template: str | None = _flag(
        None,
        "chat_template",
        "a chat_template.json or its folder; none for plain text (default: the tokenizer's own)",
    )
    tokenizer_name_or_path: str | None = _flag(
        None, "tokenizer_name_or_path", "where the tokenizer is (default: with the model)", "--tokenizer-name-or-path"
    )
    skip_bad_lines: bool = _switch("skip_bad_lines", "leave out input lines that cannot be used; they get no output")
    resume: bool = _switch("resume", "go on behind the lines that --output_file holds already")
    overwrite: bool = _switch("overwrite", "begin --output_file anew, whatever it holds")
    quiet: bool = _switch("quiet", "do not print sources, targets and outputs")
    benchmark: bool = _switch(
        "benchmark", "time prompts of --src_length and answers of --max_length tokens, after --data_file if given"
    )
    benchmark_warmup: int = _flag(5, "benchmark_warmup", "batches before the timed ones")
    benchmark_repeats: int = _flag(20, "benchmark_repeats", "timed batches of --batch_size requests")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise ValueError(
                "no model given; name a Hugging Face folder or a Megatron directory with --model_name_or_path"
            )
        for name in ("batch_size", "src_length", "max_length", "total_max_length", "num_beams", "benchmark_repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.benchmark_warmup < 0:
            raise ValueError(f"--benchmark_warmup is {self.benchmark_warmup}; it must be 0 or more")
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(f"--min_length is {self.min_length}; it must be from 0 to --max_length {self.max_length}")
        if self.resume and self.overwrite:
            raise ValueError("--resume keeps what --output_file holds and --overwrite drops it; give one of them")
        with by_flags(FLAGS):
            SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
            SamplingParams(num_beams=self.num_beams, length_penalty=self.length_penalty)
            self.params(self.max_length)

    @property
    def idle(self) -> list[str]:
        """Flags that say something else than their defaults and have no effect with this --decode_strategy."""
        names = [name for strategy, few in _CHOICES.items() if strategy != self.decode_strategy for name in few]
        return [
            f"--{item.name}" for item in fields(self) if item.name in names and getattr(self, item.name) != item.default
        ]

    @property
    def predicts(self) -> bool:
        """False if there is nothing to do but the benchmark."""
        return self.data_file is not None or not self.benchmark

    def total(self, max_positions: int) -> int:
        """The most tokens of prompt and answer together, for a model with a context of `max_positions`."""
        return min(max_positions, self.total_max_length or max_positions)

    def params(self, max_new_tokens: int, line: int = 1, forced: bool = False) -> SamplingParams:
        """How the answer to input line `line` (from 1) is made; ValueError for values out of range.

        Lines draw differently, so that equal ones get different samples. forced: exactly so many tokens.
        """
        samples, beams = self.decode_strategy == "sampling", self.decode_strategy == "beam_search"
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=0 if forced else min(self.min_length, max_new_tokens),
            temperature=self.temperature if samples else 0.0,
            top_k=self.top_k if samples else 0,
            top_p=self.top_p if samples else 1.0,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else derive_seed(self.seed, line - 1),
            ignore_eos=forced,
            num_beams=self.num_beams if beams else 1,
            length_penalty=self.length_penalty if beams else 1.0,
        )
