"""MindIE's flags for choosing tokens, which its commands share."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any

from mindgen.commands.flags import by_flags
from mindgen.config import option
from mindgen.engine.request import SamplingParams

_POST_PROCESS = (
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "seed", "logprobs", "top_logprobs", "request_ignore_eos", "length_penalty",
)  # fmt: skip
# What options of SamplingParams are called here.
FLAGS = {
    "n": "--param_n", "num_beams": "--best_of", "logprobs": "--top_logprobs", "stop": "--stop_strings",
    "stop_token_ids": "--stop_token_ids",
}  # fmt: skip


@dataclass(frozen=True)
class MindieSampling:
    """How to choose tokens. MindIE's names; those that are not given leave a choice as it is."""

    do_sample: bool | None = option(
        None, "draw tokens instead of taking the most probable", "--do_sample", style="truth"
    )
    temperature: float | None = option(None, "divides the logits; 0 is greedy", "--temperature")
    top_k: int | None = option(None, "sample from the k most probable tokens; 0 is all", "--top_k")
    top_p: float | None = option(None, "sample from the most probable tokens that reach this probability", "--top_p")
    repetition_penalty: float | None = option(
        None, "above 1 makes tokens that were seen less probable", "--repetition_penalty"
    )
    frequency_penalty: float | None = option(
        None, "is subtracted for each time that a token was generated", "--frequency_penalty"
    )
    presence_penalty: float | None = option(
        None, "is subtracted from the logits of generated tokens", "--presence_penalty"
    )
    seed: int = option(0, "the same seed gives the same tokens", "--seed")
    param_n: int = option(1, "answers for each prompt", "--param_n")
    best_of: int | None = option(None, "draw so many answers and give the best; beams of a beam search", "--best_of")
    use_beam_search: bool = option(False, "search with --best_of beams", "--use_beam_search", style="truth")
    length_penalty: float = option(1.0, "beams are ranked by log-probability / length ** penalty", "--length_penalty")
    logprobs: bool = option(False, "report the log-probability of each token", "--logprobs", style="truth")
    top_logprobs: int = option(0, "and of so many of the most probable ones", "--top_logprobs")
    ignore_eos: bool = option(False, "go on after an end of text", "--ignore_eos", style="truth")
    request_ignore_eos: bool = option(False, "the same", "--request_ignore_eos", style="truth")
    stop_strings: str | None = option(None, "strings that end the text, as a JSON list", "--stop_strings")
    stop_token_ids: str | None = option(None, "tokens that end the text, as a JSON list", "--stop_token_ids")
    include_stop_str_in_output: bool = option(
        False, "refused: the text ends before a stop string", "--include_stop_str_in_output", style="truth"
    )
    skip_special_tokens: bool = option(
        True, "the only choice: text holds no special tokens", "--skip_special_tokens", style="truth"
    )

    def __post_init__(self) -> None:
        if self.include_stop_str_in_output:
            raise ValueError("--include_stop_str_in_output is not supported: a text ends before its stop string")
        if not self.skip_special_tokens:
            raise ValueError("--skip_special_tokens false is not supported: text holds no special tokens")
        if self.best_of is not None and self.best_of < self.param_n:
            raise ValueError(f"--best_of is {self.best_of}, less than --param_n {self.param_n}; raise --best_of")
        if self.use_beam_search and self._num_beams < 2:
            raise ValueError("--use_beam_search needs at least 2 beams; set --best_of")
        if self.use_beam_search:
            self._check_beams()

    def without_post_process(self) -> tuple[MindieSampling, list[str]]:
        """What is left when post-processing is off, and the flags that were given in vain. ValueError for several
        answers, which need it."""
        if self._num_beams > 1:
            raise ValueError("--param_n, --best_of and --use_beam_search need --do_post_process; add it")
        plain: dict[str, Any] = {item.name: item.default for item in fields(self) if item.name in _POST_PROCESS}
        vain = [f"--{name}" for name, value in plain.items() if getattr(self, name) != value]
        return replace(self, **plain), vain

    @property
    def idle(self) -> list[str]:
        """Flags that were given and have no effect beside the others."""
        given = [f"--{name}" for name in _FILTERS if not self._draws and getattr(self, name) is not None]
        return given + ["--length_penalty"] * (self.length_penalty != 1.0 and not self.use_beam_search)

    def params(self, max_new_tokens: int) -> SamplingParams:
        """What every request asks. Raises ValueError for values out of range."""
        self._check_best_of()
        with by_flags(FLAGS):
            return self._params(max_new_tokens)

    def _check_beams(self) -> None:
        given = " and ".join(f"--{name}" for name in ("logprobs", "top_logprobs") if getattr(self, name))
        if given:
            raise ValueError(f"--use_beam_search reports no log-probabilities of tokens; leave out {given}")

    def _check_best_of(self) -> None:
        if self.use_beam_search or self._num_beams == self.param_n or self._draws:
            return
        if self.do_sample is None:
            raise ValueError(f"--best_of is {self.best_of}, but no flag says to draw answers; add --do_sample")
        raise ValueError(
            f"--best_of is {self.best_of}, but --do_sample false gives the same answer each time; leave one out"
        )

    def _params(self, max_new_tokens: int) -> SamplingParams:
        several, draws = self._num_beams > self.param_n, self._draws
        chosen = {name: value for name in _FILTERS if draws and (value := getattr(self, name)) is not None}
        penalties = {name: value for name in _PENALTIES if (value := getattr(self, name)) is not None}
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            seed=self.seed,
            n=self.param_n,
            best_of=self.best_of if several and not self.use_beam_search else None,
            num_beams=self._num_beams if self.use_beam_search else 1,
            length_penalty=self.length_penalty,
            logprobs=self.top_logprobs if self.logprobs or self.top_logprobs else None,
            ignore_eos=self.ignore_eos or self.request_ignore_eos,
            stop=tuple(read_json_list(self.stop_strings, str, "--stop_strings")),
            stop_token_ids=tuple(read_json_list(self.stop_token_ids, int, "--stop_token_ids")),
            **({"temperature": 0.0} if not draws else {}) | chosen | penalties,
        )

    @property
    def _draws(self) -> bool:
        """As asked; else whether anything is said about how to draw."""
        if self.do_sample is not None:
            return self.do_sample
        return any(getattr(self, name) is not None for name in _FILTERS)

    @property
    def _num_beams(self) -> int:
        return self.param_n if self.best_of is None else self.best_of


_FILTERS = ("temperature", "top_k", "top_p")
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


def read_json_list(text: str | None, kind: type, flag: str) -> list[Any]:
    """The values of a JSON list, or of one value alone; none for None. ValueError for anything else."""
    if text is None:
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    values = value if isinstance(value, list) else [value]
    if not all(type(item) is kind for item in values):
        example = '["###"]' if kind is str else "[2, 7]"
        raise ValueError(f"{flag} {text} is not a JSON list such as {example}")
    return values
