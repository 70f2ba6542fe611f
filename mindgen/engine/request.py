"""What was asked (Request), how far we are (Sequence), what came out (Output)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal

from mindgen.engine.params import MOST_SAMPLES, SEED_LIMIT, SamplingParams
from mindgen.engine.past import Past, Rules, TokenIds

__all__ = [
    "MOST_SAMPLES", "SEED_LIMIT", "FinishReason", "Output", "Request", "RowParams", "SamplingParams", "Sequence",
    "Status", "TokenLogprob", "derive_seed",
]  # fmt: skip

FinishReason = Literal["eos", "length", "stop", "abort", "error"]

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of splitmix64


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

    def named(self, message: str, name: str) -> str:
        """A message on it, for somebody who never heard of its `id` and calls it by this name."""
        return message.replace(f"request {self.id}", name)


@dataclass(frozen=True)
class RowParams:
    """What the sampler must know of a request, for each of its rows.

    num_top: how many alternatives come back with the token. min_keep: how many tokens top-k, top-p and min-p leave at
    least. beam: processors act on log-probabilities, and the alternatives are the candidates of a beam. logprob: is
    the chosen token's log-probability wanted?
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    num_top: int
    min_keep: int
    beam: bool
    logprob: bool

    @classmethod
    def of(cls, params: SamplingParams, num_end_ids: int = 0) -> RowParams:
        """`num_end_ids` different tokens can end the text. The counts for beams are those of transformers."""
        beam = params.num_beams > 1
        return cls(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            num_top=max(2, 1 + num_end_ids) * params.num_beams if beam else params.logprobs or 0,
            min_keep=1 + max(1, num_end_ids) if beam else 1,
            beam=beam,
            logprob=params.logprobs is not None or params.best_of is not None,
        )

    @cached_property
    def integers(self) -> tuple[int, ...]:
        """As they travel, in the order of `batch.ROW_INTEGERS`."""
        return self.top_k, self.num_top, self.min_keep, int(self.beam), int(self.logprob)

    @cached_property
    def floats(self) -> tuple[float, ...]:
        """As they travel, in the order of `batch.ROW_FLOATS`."""
        return self.temperature, self.top_p, self.min_p, self.repetition_penalty


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One answer in progress.

    tokens: the prompt and what was generated. blocks: its places in the cache, in order, after num_forgotten
    that were given back because nothing sees them any more. num_computed: how many tokens have their keys and values
    there or had them. num_samples: rows to draw when all tokens are computed: n for a prompt
    that is still one for n samples, else 1. in_flight: part of a step whose results are not back yet. num_scored: how
    many tokens of the prompt, after the first, have their log-probabilities, where they are wanted. past: what
    processors must know of the tokens. reuse: False to compute every token, even where the cache knows its block. salt:
    what else its keys and values depend on, for example an adapter; blocks are shared only among equals. is_long:
    it has more tokens than the short context of the model, so that all its positions are turned in another way. keys:
    those of its full blocks, as far as they were wanted.
    """

    request: Request
    row: RowParams
    seed: int
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_forgotten: int = 0
    num_computed: int = 0
    num_samples: int = 1
    status: Status = Status.WAITING
    in_flight: bool = False
    num_scored: int = 0
    reuse: bool = True
    salt: str = ""
    is_long: bool = False
    keys: list[bytes] = field(default_factory=list)
    past: Past = field(kw_only=True)

    @classmethod
    def start(
        cls, request: Request, seed: int, end_ids: Collection[int] = (), bad_words: Iterable[TokenIds] = ()
    ) -> Sequence:
        """The sequence that computes the prompt of a request. `end_ids` can end its text; `bad_words` are token ids."""
        params, tokens = request.params, list(request.prompt)
        past = Past(Rules.of(params, len(tokens), end_ids, bad_words))
        sequence = cls(request, RowParams.of(params, len(end_ids)), seed, tokens=tokens, past=past)
        sequence.num_samples = params.num_drawn if params.num_beams == 1 else 1
        sequence.reuse = params.num_prompt_top is None  # a token that is not computed has no logits
        return sequence

    def fork(self, index: int) -> Sequence:
        """A sequence with the same past and its own number; it owns no blocks yet."""
        past, tokens, keys = self.past.fork(), list(self.tokens), list(self.keys)
        child = Sequence(self.request, self.row, self.seed, index, tokens, num_computed=self.num_computed, past=past)
        child.status, child.keys, child.num_scored = self.status, keys, self.num_scored
        child.salt, child.is_long = self.salt, self.is_long
        return child

    @property
    def num_left(self) -> int:
        """How many tokens are not computed yet."""
        return len(self.tokens) - self.num_computed

    def begin_long(self) -> None:
        """It outgrew the short context: everything is left to compute, and what the cache knows is of no use to it."""
        self.is_long, self.num_computed, self.keys = True, 0, []

    def row_seed(self, sample: int = 0) -> int:
        """The seed of one of its rows."""
        return derive_seed(self.seed, self.index + sample)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token before any processor, and the most probable (token id, logprob) pairs.

    `logprob` is None for the first token of a prompt, which nothing precedes, and where the model gave NaN.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """News of one sequence: new token ids (an end-of-text token included) and the text that became certain.

    The pieces of a sequence concatenate to its whole text, which holds neither end tokens nor stop strings. With
    `echo` the first piece begins with the prompt: its token ids, its text and its log-probabilities.
    finish_reason: None while it goes on; `eos`, `length` (max_new_tokens), `stop` (a stop string or stop token),
    `abort`, or `error`, for which `message` says what happened. score: of a beam, its rank value; with `best_of` the
    sum of the log-probabilities of the generated tokens. prompt_logprobs: where asked for, one for every token of the
    prompt, with the first piece of each sequence.
    """

    request_id: int
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    message: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


def derive_seed(seed: int, index: int) -> int:
    """The seed of sample or beam `index`; number 0 has the seed itself. The mixing is splitmix64's finaliser."""
    if index == 0:
        return seed
    state = (seed + index * _GOLDEN) % SEED_LIMIT
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % SEED_LIMIT
    state = (state ^ state >> 27) * 0x94D049BB133111EB % SEED_LIMIT
    return state ^ state >> 31
