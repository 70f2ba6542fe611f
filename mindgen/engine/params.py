"""How tokens are chosen and when a text ends: what a request may ask, checked when it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

from mindgen.config import as_real, as_whole
from mindgen.text.unicode import require_utf8

SEED_LIMIT = 1 << 64
MOST_SAMPLES = 256  # samples or beams of one request
_MOST_LOGPROBS = 1000
_LARGEST = (1 << 31) - 1
_SMALLEST = 1e-5  # below it float32 logits overflow
_LARGEST_PENALTY = 1e5

Strings = str | list[str] | tuple[str, ...]
TokenIds = list[int] | tuple[int, ...]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    max_new_tokens: the most tokens to generate.
    min_new_tokens: before that many tokens are generated no end token can be drawn, and no stop string counts.
    temperature: divides the logits; 0 chooses the most probable token (greedy), and with beams it means a search
        without sampling.
    top_k: keep the k most probable tokens, ties included; 0 keeps all.
    top_p: keep the most probable tokens until their probabilities reach this sum; 1 keeps all.
    min_p: keep tokens of at least this share of the most probable one's probability; 0 keeps all.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt and answer; 1 is off.
    presence_penalty: is subtracted from the logits of tokens generated so far; -2 to 2.
    frequency_penalty: is subtracted once for each time a token was generated; -2 to 2.
    seed: 0 to 2**64 - 1; the same seed gives the same tokens in any company. None draws one.
    stop: strings that end the text; they are not part of it. A single string or several.
    stop_token_ids: tokens that end the text, beside the model's own; kept in the token ids, absent from the text.
    ignore_eos: go on after an end-of-text token.
    n: how many answers; sample 0 is the answer that n=1 gives. With beams, how many of the best are returned.
    best_of: draw so many samples and return the n with the largest sums of log-probabilities, best first and at the
        end; None returns samples as they come.
    num_beams: more than one makes it a beam search; its answers come at the end.
    length_penalty: beams are ranked by sum of log-probabilities / length**length_penalty.
    logprobs: None, or how many of the most probable tokens to report beside each chosen token's log-probability.
    prompt_logprobs: None, or the same for each token of the prompt, given those before it.
    echo: the answer begins with the prompt: its token ids, its text, and with `logprobs` its log-probabilities.
    logit_bias: token id to a number from -100 to 100 that is added to its logit. Given as a dict; kept as pairs.
    bad_words: strings that must not appear; the last token of each way to write one is never drawn. Texts that are
        cut into tokens in an unusual way can still spell it.

    Lists are kept as tuples, so that it can be hashed, and numbers of other types, such as numpy's, as int and float.
    Raises ValueError for a value outside its range and for options that contradict each other.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Strings = ()
    stop_token_ids: TokenIds = ()
    ignore_eos: bool = False
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    logprobs: int | None = None
    min_new_tokens: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    best_of: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    bad_words: Strings = ()

    def __post_init__(self) -> None:
        self._keep("stop", _strings("stop", self.stop))
        self._keep("bad_words", _strings("bad_words", self.bad_words))
        self._keep("stop_token_ids", _token_ids(self.stop_token_ids))
        self._keep("logit_bias", _biases(self.logit_bias))
        self._check_filters()
        self._check_counts()
        self._check_flags()
        if self.best_of is not None:
            self._keep_int("best_of", 1, MOST_SAMPLES)
            self._check_best_of(self.best_of)
        if self.num_beams > 1:
            self._check_beams()

    @property
    def num_drawn(self) -> int:
        """How many samples are drawn, of which n are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_prompt_top(self) -> int | None:
        """How many alternatives are wanted beside each token of the prompt; None if nothing is."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _keep_int(self, name: str, low: int, high: int) -> None:
        self._keep(name, _whole(name, getattr(self, name), low, high))

    def _keep_float(self, name: str, low: float, high: float) -> None:
        self._keep(name, _number(name, getattr(self, name), low, high))

    def _check_filters(self) -> None:
        self._keep("temperature", _temperature(self.temperature))
        self._keep_int("top_k", 0, _LARGEST)
        self._keep_float("top_p", 0.0, 1.0)
        self._keep_float("min_p", 0.0, 1.0)
        self._keep_float("repetition_penalty", _SMALLEST, _LARGEST_PENALTY)
        self._keep_float("presence_penalty", -2.0, 2.0)
        self._keep_float("frequency_penalty", -2.0, 2.0)
        self._keep_float("length_penalty", -10.0, 10.0)

    def _check_counts(self) -> None:
        self._keep_int("max_new_tokens", 1, _LARGEST)
        self._keep_int("min_new_tokens", 0, _LARGEST)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens, which is {self.max_new_tokens}; "
                "lower the one or raise the other"
            )
        self._keep_int("n", 1, MOST_SAMPLES)
        self._keep_int("num_beams", 1, MOST_SAMPLES)
        if self.seed is not None:
            self._keep_int("seed", 0, SEED_LIMIT - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._keep_int(name, 0, _MOST_LOGPROBS)

    def _check_flags(self) -> None:
        for name in ("ignore_eos", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    def _check_best_of(self, best_of: int) -> None:
        if best_of < self.n:
            raise ValueError(f"best_of is {best_of}, but n is {self.n} of them; it must be {self.n} or more")
        if best_of > 1 and self.temperature == 0:
            raise ValueError(f"best_of is {best_of}, but temperature 0 draws the same answer each time; leave one out")

    def _check_beams(self) -> None:
        if self.n > self.num_beams:
            raise ValueError(
                f"n is {self.n}, but {self.num_beams} beams give at most that many answers; raise num_beams"
            )
        if self.stop:
            raise ValueError("beam search compares token sequences and knows no stop strings; use stop_token_ids")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but a beam search reports no log-probabilities of tokens; "
                    "leave it out"
                )
        if self.best_of is not None:
            raise ValueError(f"best_of is {self.best_of}, but beams are ranked already; leave it out or num_beams")


def _strings(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name} is {value!r}; it must be a string, or a list or tuple of strings, that are not empty")
    try:
        for text in texts:
            require_utf8(text)
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}: {error}") from None
    return tuple(texts)


def _token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | range):
        raise ValueError(f"stop_token_ids is {value!r}; it must be a list or tuple of token ids")
    return tuple(_whole("a stop token id", token, 0) for token in value)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs in the order of token ids; equal ones make equal parameters."""
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        biases = [(token, bias) for token, bias in pairs]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias is {value!r}; it must be a dict of token id to number") from None
    kept = {}
    for token, bias in biases:
        whole = _whole("a token id of logit_bias", token, 0)
        kept[whole] = _number(f"the logit_bias of token {whole}", bias, -100.0, 100.0)
    return tuple(sorted(kept.items()))


def _whole(name: str, value: object, low: int, high: int | None = None) -> int:
    whole = as_whole(value)
    if whole is None or whole < low or (high is not None and whole > high):
        limit = "" if high is None else f" to {high}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low}{limit or ' up'}")
    return whole


def _number(name: str, value: object, low: float, high: float) -> float:
    number = as_real(value)
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    return number


def _temperature(value: object) -> float:
    number = as_real(value)
    if number is None or not isfinite(number) or not (number == 0 or number >= _SMALLEST):
        raise ValueError(f"temperature is {value!r}; it must be 0 (greedy) or a number from {_SMALLEST:g} up")
    return number
