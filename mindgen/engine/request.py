"""What was asked (Request), how far we are (Sequence), what came out (Output)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Literal

FinishReason = Literal["eos", "length", "stop", "abort", "error"]

SEED_LIMIT = 1 << 64
MOST_SAMPLES = 256  # samples or beams of one request
_LARGEST = (1 << 31) - 1
_SMALLEST = 1e-5  # below it float32 logits overflow
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of splitmix64


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    max_new_tokens: the most tokens to generate.
    temperature: divides the logits; 0 chooses the most probable token (greedy), and with beams it means a search
        without sampling.
    top_k: keep the k most probable tokens, ties included; 0 keeps all.
    top_p: keep the most probable tokens until their probabilities reach this sum; 1 keeps all.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt and answer; 1 is off.
    seed: 0 to 2**64 - 1; the same seed gives the same tokens in any company. None draws one.
    stop: strings that end the text; they are not part of it.
    stop_token_ids: tokens that end the text, beside the model's own; kept in the token ids, absent from the text.
    ignore_eos: go on after an end-of-text token.
    n: how many answers; sample 0 is the answer that n=1 gives. With beams, how many of the best are returned.
    num_beams: more than one makes it a beam search; its answers come at the end.
    length_penalty: beams are ranked by sum of log-probabilities / length**length_penalty.
    logprobs: None, or how many of the most probable tokens to report beside each chosen token's log-probability.

    Raises ValueError for a value outside its range and for options that contradict each other.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, _LARGEST)
        _check_float("temperature", self.temperature, 0.0)
        if 0 < self.temperature < _SMALLEST:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or at least {_SMALLEST}")
        _check_int("top_k", self.top_k, 0, _LARGEST)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, _SMALLEST, 1 / _SMALLEST)
        _check_float("length_penalty", self.length_penalty, -10.0, 10.0)
        _check_int("n", self.n, 1, MOST_SAMPLES)
        _check_int("num_beams", self.num_beams, 1, MOST_SAMPLES)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, SEED_LIMIT - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, 1000)
        self._check_stops()
        if self.num_beams > 1:
            self._check_beams()

    def _check_stops(self) -> None:
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a tuple of strings that are not empty")
        for token in self.stop_token_ids:
            _check_int("a stop token id", token, 0)

    def _check_beams(self) -> None:
        if self.n > self.num_beams:
            raise ValueError(
                f"n is {self.n}, but {self.num_beams} beams give at most that many answers; raise num_beams"
            )
        if self.stop:
            raise ValueError("beam search compares token sequences and knows no stop strings; use stop_token_ids")
        if self.logprobs is not None:
            raise ValueError("beam search reports no log-probabilities of tokens; leave logprobs out")


@dataclass(frozen=True)
class Request:
    """What was asked: `prompt` holds token ids; `id` is unique among the requests of an engine.

    Raises ValueError for an empty prompt.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"the prompt of request {self.id} is empty; it needs a token, for example the BOS")


@dataclass(frozen=True)
class RowParams:
    """What the sampler must know of a request, for each of its rows.

    num_top: how many alternatives come back with the token. min_keep: how many tokens top-p and top-k leave at least.
    beam: processors act on log-probabilities, and the alternatives are the candidates of a beam.
    """

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    num_top: int
    min_keep: int
    beam: bool

    @classmethod
    def of(cls, params: SamplingParams, num_end_ids: int = 0) -> RowParams:
        """`num_end_ids` different tokens can end the text. The counts for beams are those of transformers."""
        beam = params.num_beams > 1
        return cls(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            repetition_penalty=params.repetition_penalty,
            num_top=max(2, 1 + num_end_ids) * params.num_beams if beam else params.logprobs or 0,
            min_keep=1 + max(1, num_end_ids) if beam else 1,
            beam=beam,
        )


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One answer in progress.

    tokens: the prompt and what was generated. blocks: its places in the cache, in order. num_computed: how many
    tokens have their keys and values there. num_samples: rows to draw when all tokens are computed: n for a prompt
    that is still one for n samples, else 1. in_flight: part of a step whose results are not back yet.
    """

    request: Request
    row: RowParams
    seed: int
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_samples: int = 1
    status: Status = Status.WAITING
    in_flight: bool = False

    @classmethod
    def start(cls, request: Request, seed: int, num_end_ids: int = 0) -> Sequence:
        """The sequence that computes the prompt of a request."""
        params = request.params
        samples = params.n if params.num_beams == 1 else 1
        return cls(request, RowParams.of(params, num_end_ids), seed, tokens=list(request.prompt), num_samples=samples)

    def fork(self, index: int) -> Sequence:
        """A sequence with the same past and its own number; it owns no blocks yet."""
        return Sequence(
            self.request, self.row, self.seed, index, list(self.tokens), [], self.num_computed, 1, self.status
        )

    @property
    def num_left(self) -> int:
        """How many tokens are not computed yet."""
        return len(self.tokens) - self.num_computed

    def row_seed(self, sample: int = 0) -> int:
        """The seed of one of its rows."""
        return derive_seed(self.seed, self.index + sample)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a chosen token before any processor, and the most probable (token id, logprob) pairs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """News of one sequence: new token ids (an end-of-text token included) and the text that became certain.

    The pieces of a sequence concatenate to its whole text, which holds neither end tokens nor stop strings.
    finish_reason: None while it goes on; `eos`, `length` (max_new_tokens), `stop` (a stop string or stop token),
    `abort`, or `error`, for which `message` says what happened. score: of a beam, its rank value.
    """

    request_id: int
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    message: str | None = None


def derive_seed(seed: int, index: int) -> int:
    """The seed of sample or beam `index`; number 0 has the seed itself. The mixing is splitmix64's finaliser."""
    if index == 0:
        return seed
    state = (seed + index * _GOLDEN) % SEED_LIMIT
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % SEED_LIMIT
    state = (state ^ state >> 27) * 0x94D049BB133111EB % SEED_LIMIT
    return state ^ state >> 31


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limit = "" if high is None else f" to {high}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low}{limit or ' up'}")


def _check_float(name: str, value: object, low: float, high: float | None = None, above: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not fits or value < low or (above and value == low) or (high is not None and value > high):  # type: ignore[operator]
        limit = f"above {low}" if above else f"from {low}" + (" up" if high is None else f" to {high}")
        raise ValueError(f"{name} is {value!r}; it must be a number {limit}")
