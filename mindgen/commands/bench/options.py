"""The options of `bench`; its flags come from these fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite

from mindgen.commands.files import check_apart, check_writable
from mindgen.config import option

_NUM_SERVED = 16


@dataclass(frozen=True)
class Span:
    """Lengths in tokens from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, flag: str, text: str) -> Span:
        """`64` or `16-256`. ValueError names the flag."""
        first, _, last = text.partition("-")
        if not all(part.isascii() and part.isdigit() for part in (first, last or first)):
            raise ValueError(f"{flag} {text!r} is neither a number of tokens such as 64 nor a span such as 16-256")
        span = cls(int(first), int(last or first))
        if not 1 <= span.low <= span.high:
            raise ValueError(f"{flag} {text!r} must go from 1 or more tokens up to at least as many")
        return span

    @property
    def is_exact(self) -> bool:
        return self.low == self.high

    def __str__(self) -> str:
        return str(self.low) if self.is_exact else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Shape:
    """One point of the grid: so many prompts at once, each of `input_len` tokens, each going on for `output_len`."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class BenchConfig:
    """What to measure. Every list is crossed with the others; lengths are exact, for an end of text ends nothing."""

    batch_size: tuple[int, ...] = option((1,), "prompts at once, e.g. 1,8", metavar="N,N,...")
    input_len: tuple[str, ...] = option(
        ("128",), "tokens of a prompt, e.g. 128,512; with --request-rate also a span: 16-256", metavar="N,N,..."
    )
    output_len: tuple[str, ...] = option(
        ("64",), "tokens to generate for each prompt, as --input-len", metavar="N,N,..."
    )
    repeats: int = option(3, "measured runs of each point; their median and spread are shown")
    warmup: int = option(1, "runs of each point before the measured ones, not counted")
    seed: int = option(0, "decides random token ids, lengths, arrivals and random weights")
    text_file: str | None = option(None, "cut the prompts out of this text (default: random token ids)")
    request_rate: float | None = option(
        None, "measure serving: requests arrive at random, so many a second on average; inf is all at once", metavar="X"
    )
    num_requests: int | None = option(None, "requests of a run with --request-rate (default: 16)")
    random_weights: str | None = option(
        None, "instead of --load: seeded weights for a config.json, its folder, or a shape known by name"
    )
    vs: str | None = option(None, "alternate with transformers (hf) on the same weights and prompts", choices=("hf",))
    json: str | None = option(None, "write everything measured to this file", metavar="FILE")
    plot: str | None = option(None, "draw roofline and latency distribution into this PNG file", metavar="FILE")

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--batch-size", min(self.batch_size), 1),
            ("--repeats", self.repeats, 1),
            ("--warmup", self.warmup, 0),
            ("--num-requests", self.num_served, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{flag} is {value}; it must be {least} or more")
        self._check_rate()
        if self.plot is not None and not self.plot.lower().endswith(".png"):
            raise ValueError(f"--plot {self.plot} has another suffix than .png; the picture is a PNG, name it so")
        if self.plot is not None and find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib; install it: pip install 'mindgen[bench]'")

    @property
    def inputs(self) -> list[Span]:
        return [Span.parse("--input-len", text) for text in self.input_len]

    @property
    def outputs(self) -> list[Span]:
        return [Span.parse("--output-len", text) for text in self.output_len]

    @property
    def is_serving(self) -> bool:
        return self.request_rate is not None

    @property
    def num_served(self) -> int:
        """Requests of a serving run."""
        return _NUM_SERVED if self.num_requests is None else self.num_requests

    def shapes(self) -> Iterator[Shape]:
        """The grid, when not serving."""
        for batch_size in self.batch_size:
            for inputs in self.inputs:
                yield from (Shape(batch_size, inputs.low, outputs.low) for outputs in self.outputs)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and the longest answer together."""
        return max(span.high for span in self.inputs) + max(span.high for span in self.outputs)

    @property
    def most_at_once(self) -> int:
        """Requests in progress together, at most."""
        return self.num_served if self.is_serving else max(self.batch_size)

    def check_files(self) -> None:
        """Refuses files that could not be written at the end. ValueError names the flag."""
        for flag, name in (("--json", self.json), ("--plot", self.plot)):
            if name is not None:
                check_writable(flag, name)
                check_apart(flag, name, {"--text-file": self.text_file})
        if self.plot is not None:
            check_apart("--plot", self.plot, {"--json": self.json})

    def _check_rate(self) -> None:
        if self.request_rate is None:
            spans = [span for span in (*self.inputs, *self.outputs) if not span.is_exact]
            if spans:
                raise ValueError(f"{spans[0]} is a span of lengths, which needs --request-rate; inf is all at once")
            if self.num_requests is not None:
                raise ValueError(
                    f"--num-requests {self.num_requests} needs --request-rate (inf is all at once); a grid has "
                    "--batch-size"
                )
            return
        if not self.request_rate > 0:
            raise ValueError(f"--request-rate is {self.request_rate}; it must be above 0, or inf")
        if len(self.inputs) > 1 or len(self.outputs) > 1 or self.batch_size != (1,):
            raise ValueError(
                "--request-rate measures one run: give one --input-len and one --output-len (16-256 mixes lengths), "
                "and --num-requests instead of --batch-size"
            )
        if self.vs is not None and isfinite(self.request_rate):
            raise ValueError("--vs hf runs one padded batch, which needs all requests at once: --request-rate inf")
