"""What is asked of the engine: prompts of exact lengths, and when they arrive."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import isinf

from mindgen.commands.bench.options import BenchConfig, Shape, Span
from mindgen.engine.request import Request, SamplingParams

Arrival = tuple[float, Request]


@dataclass(frozen=True)
class Words:
    """Where tokens come from: a text as token ids, or random ones below `vocab_size`."""

    vocab_size: int
    seed: int
    text: tuple[int, ...] = ()

    def chances(self, *what: object) -> random.Random:
        """A generator of its own for every purpose."""
        return random.Random(f"{self.seed} {what}")

    def prompt(self, length: int, *what: object) -> tuple[int, ...]:
        """`length` tokens, different for everything they are for: nothing is found in the cache by accident.

        A text is cut at a random place and begins again at its end.
        """
        chances = self.chances("prompt", *what)
        if not self.text:
            return tuple(chances.choices(range(self.vocab_size), k=length))
        start = chances.randrange(len(self.text))
        return tuple(self.text[(start + at) % len(self.text)] for at in range(length))


def batch_of(shape: Shape, words: Words, turn: object) -> list[Arrival]:
    """The prompts of one run of a grid point, all at once."""
    lengths = [(shape.input_len, shape.output_len)] * shape.batch_size
    return [(0.0, _request(number, *pair, words, (shape, turn))) for number, pair in enumerate(lengths)]


def mix_of(options: BenchConfig, words: Words, turn: object) -> list[Arrival]:
    """The requests of a serving run: lengths are the same in every turn, tokens are not.

    Gaps between arrivals are exponential (a Poisson process) with the mean 1 / rate; the first arrives at once.
    """
    assert options.request_rate is not None
    (inputs,), (outputs,) = options.inputs, options.outputs
    lengths, gaps, now = words.chances("lengths"), words.chances("gaps"), 0.0
    arrivals = []
    for number in range(options.num_served):
        request = _request(number, _draw(inputs, lengths), _draw(outputs, lengths), words, ("mix", turn))
        arrivals.append((now, request))
        now += 0.0 if isinf(options.request_rate) else gaps.expovariate(options.request_rate)
    return arrivals


def _draw(span: Span, chances: random.Random) -> int:
    return chances.randint(span.low, span.high)


def _request(number: int, input_len: int, output_len: int, words: Words, what: tuple[object, ...]) -> Request:
    params = SamplingParams(max_new_tokens=output_len, temperature=0.0, ignore_eos=True)
    return Request(number, words.prompt(input_len, *what, number), params)
