"""The options of `run_generator` that are not about choosing tokens; names and defaults are MindIE's."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from mindgen.commands.flags import from_flags
from mindgen.commands.mindie.plugins import PluginParams
from mindgen.config import EngineConfig, option

DEFAULT_TEXTS = ("What's deep learning?", "How do you feel?") * 2
_RANGES = {
    "max_batch_size": (1, 819_200),
    "max_input_length": (1, 1_000_000),
    "max_output_length": (1, 1_000_000),
    "max_new_tokens": (1, 1_000_000),
    "max_seq_len": (2, 1_000_000),
    "max_prefill_tokens": (1, 1_000_000),
    "split_chunk_tokens": (1, 1_000_000),
    "block_size": (1, 1024),
}


@dataclass(frozen=True)
class GeneratorConfig:
    """What to ask, and how much at once. Raises ValueError for what mindgen does not have."""

    model: str | None = option(None, "a Hugging Face folder or a Megatron directory of any TP x PP",
                               "--model_path", "--load", "--model")  # fmt: skip
    input_texts: tuple[str, ...] = option(
        (), "prompts (default: two short questions, twice)", "--input_texts", style="several"
    )
    input_ids: tuple[str, ...] = option((), "prompts as token ids: 1,5,7 2,9", "--input_ids", style="several")
    input_file: str | None = option(
        None, "prompts, one a line: token ids in a .csv, else text or JSON; for a chat model also lists of messages",
        "--input_file",
    )  # fmt: skip
    is_chat_model: bool = option(False, "put each prompt into the chat template", "--is_chat_model", style="truth")
    chat_template: str | None = option(None, "a Jinja template, or a file with one (default: the model's)",
                                       "--chat_template")  # fmt: skip
    tokenizer: str | None = option(None, "where the tokenizer is (default: with the model)", "--tokenizer-name-or-path")
    load_tokenizer: bool = option(
        True, "without it prompts and answers are token ids", "--load_tokenizer", style="truth"
    )
    max_batch_size: int | None = option(
        None, "requests at once (default: as many as the cache holds); a single prompt is asked so many times",
        "--max_batch_size",
    )  # fmt: skip
    max_input_length: int = option(1024, "the longest prompt, in tokens", "--max_input_length")
    max_output_length: int = option(20, "the most tokens of an answer", "--max_output_length")
    max_new_tokens: int | None = option(None, "the same; the smaller one wins", "--max_new_tokens")
    max_seq_len: int | None = option(
        None,
        "the most tokens of prompt and answer together (default: the model's; MindIE's is 2048)",
        "--max_position_embeddings",
    )
    max_prefill_tokens: int | None = option(
        None, "the same as --max-batch-tokens (default: as there, 2048; MindIE's is 4096)", "--max_prefill_tokens"
    )
    npu_mem: float = option(-1, "GiB of cache on each rank; -1 is automatic", "--npu_mem")
    block_size: int | None = option(
        None, "tokens of one cache block, at most 1024 (default: 128)", "--block_size", "--block-size"
    )
    plugin_params: str | None = option(
        None, "a JSON text with plugin_type: prefix_cache, splitfuse, both between commas, or nothing",
        "--plugin_params",
    )  # fmt: skip
    split_chunk_tokens: int | None = option(None, "with splitfuse: the same as --max-batch-tokens",
                                            "--split_chunk_tokens")  # fmt: skip
    speculation_gamma: int = option(0, "tokens guessed ahead; needs a plugin that guesses", "--speculation_gamma")
    num_speculative_tokens: int = option(0, "the same", "--num_speculative_tokens")
    eos_token_id: str | None = option(
        None, "tokens that end the text instead of the model's, as JSON: 2 or [2, 7]", "--eos_token_id"
    )
    do_post_process: bool = option(False, "without it answers are greedy", "--do_post_process", style="truth")
    tp: int = option(-1, "the same as --tensor-model-parallel-size; -1 is all ranks", "--tp")
    dp: int = option(-1, "1 is all there is; start one process for each copy of the model", "--dp")
    moe_tp: int = option(-1, "ranks that share an expert; -1 is what moe_ep leaves of tp", "--moe_tp")
    moe_ep: int = option(-1, "as --expert-model-parallel-size", "--moe_ep")
    input_dict: str | None = option(None, "refused: no LoRA adapters yet", "--input_dict")
    backend_type: str | None = option(None, "has no effect; see --attention", "--backend_type", choices=("atb", "ms"))
    trust_remote_code: bool = option(
        False, "has no effect: code of a checkpoint is never run", "--trust_remote_code", style="truth"
    )

    def __post_init__(self) -> None:
        self._check_ranges()
        sources = [f"--{name}" for name in ("input_texts", "input_ids", "input_file") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} both give prompts; leave one out")
        if not self.load_tokenizer and not (self.input_ids or (self.input_file or "").endswith(".csv")):
            raise ValueError("--load_tokenizer false needs token ids: --input_ids, or an --input_file of them (.csv)")
        if self.chat_template is not None and not self.is_chat_model:
            raise ValueError("--chat_template needs --is_chat_model; add it")
        if self.input_dict is not None:
            raise ValueError("--input_dict is not supported: there are no LoRA adapters; give --input_texts")

    def _check_ranges(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = "--max_position_embeddings" if name == "max_seq_len" else f"--{name}"
                raise ValueError(f"{flag} is {value}; it must be {low} to {high}")
        if self.npu_mem != -1 and not self.npu_mem > 0:
            raise ValueError(f"--npu_mem is {self.npu_mem}; it must be -1 (automatic) or a number of GiB above 0")
        if self.tp != -1 and self.tp < 1:
            raise ValueError(f"--tp is {self.tp}; it must be -1 (all ranks) or at least 1")
        for name in ("moe_ep", "moe_tp"):
            if getattr(self, name) != -1 and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be -1 (automatic) or at least 1")
        if self.moe_tp != -1 and self.tp != -1 and self.moe_tp * max(1, self.moe_ep) != self.tp:
            raise ValueError(
                f"--moe_tp {self.moe_tp} x --moe_ep {self.moe_ep} must be --tp {self.tp}; leave --moe_tp out"
            )
        if self.dp not in (-1, 1):
            raise ValueError(f"--dp is {self.dp}, but several copies of the model are not supported; leave it out")

    @property
    def notes(self) -> list[str]:
        """Lines on what was given and has no effect."""
        idle = [f"--{name}" for name in ("backend_type", "trust_remote_code") if getattr(self, name)]
        return [f"no effect here: {', '.join(idle)}"] if idle else []

    def room(self, length: int, shown: str, max_positions: int) -> int:
        """New tokens for a prompt of `length`; ValueError with the numbers for one that is too long."""
        if length > self.max_input_length:
            raise ValueError(
                f"the prompt {shown!r} has {length} tokens, more than --max_input_length {self.max_input_length}; "
                "shorten it or raise the limit"
            )
        most = min(max_positions, self.max_seq_len or max_positions)
        if length >= most:
            raise ValueError(
                f"the prompt {shown!r} has {length} tokens, and prompt and answer together may have {most}: "
                "no room for an answer; shorten the prompt"
            )
        return min(most - length, self.max_output_length, self.max_new_tokens or self.max_output_length)


def engine_config(options: GeneratorConfig, parsed: argparse.Namespace, plugins: PluginParams) -> EngineConfig:
    """How to run the model, with MindIE's flags beside the engine's own. ValueError where they contradict."""
    _check_drafting(options, plugins)
    if options.split_chunk_tokens not in (None, 1) and "splitfuse" not in plugins.names:
        raise ValueError("--split_chunk_tokens needs the plugin_type splitfuse in --plugin_params; add it")
    chunk = None if options.split_chunk_tokens == 1 else options.split_chunk_tokens
    given = (
        ("tensor_parallel_size", "--tp", None if options.tp == -1 else options.tp),
        ("expert_parallel_size", "--moe_ep", None if options.moe_ep == -1 else options.moe_ep),
        ("max_batch_tokens", "--max_prefill_tokens", options.max_prefill_tokens),
        ("max_batch_tokens", "--split_chunk_tokens", chunk),
        ("kv_cache_memory", "--npu_mem", None if options.npu_mem == -1 else options.npu_mem),
    )
    settled: dict[str, Any] = {}
    for name, flag, value in given:
        before = settled.get(name, getattr(parsed, name))
        if value is not None and before not in (None, value):
            raise ValueError(f"{flag} {value} contradicts {name} {before}, which another flag gives; give one of them")
        if value is not None:
            settled[name] = value
    if not options.model:
        raise ValueError("no model given; name a Hugging Face folder or a Megatron directory with --model_path")
    return from_flags(EngineConfig, parsed, **settled)


def _check_drafting(options: GeneratorConfig, plugins: PluginParams) -> None:
    for name in ("speculation_gamma", "num_speculative_tokens"):
        value = getattr(options, name)
        if value < 0:
            raise ValueError(f"--{name} is {value}; it must be 0 or more")
        if value and not plugins.drafts:
            raise ValueError(f"--{name} is {value}, but no plugin guesses tokens ahead; leave it out")
