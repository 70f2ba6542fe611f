"""What requests cost in time: when each was asked, when its tokens came, and what that comes to for all of them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from mindgen.engine.engine import Engine
from mindgen.engine.request import FinishReason, Output, Request, Status


class Steps(Protocol):
    """What is timed: the part of an engine that takes requests and tells news."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def step(self) -> list[Output]: ...


@dataclass
class Timeline:
    """One request, in seconds on the clock of its run.

    arrival: when it was asked. num_answers: how many it gives. tokens: for each of them, (time, number of tokens) of
    every piece of news, in order. reasons: why each of them ended. end: when the last of them did, None before.
    """

    num_prompt: int
    arrival: float = 0.0
    num_answers: int = 1
    tokens: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    end: float | None = None

    def add(self, now: float, output: Output) -> None:
        """Notes a piece of news."""
        if output.token_ids:
            self.tokens.setdefault(output.index, []).append((now, len(output.token_ids)))
        if output.finish_reason is not None:
            self.reasons[output.index] = output.finish_reason
            if len(self.reasons) == self.num_answers:
                self.end = now

    @property
    def num_new(self) -> int:
        """Tokens generated, of all answers together."""
        return sum(count for pieces in self.tokens.values() for _, count in pieces)

    @property
    def first_token(self) -> float | None:
        """Seconds from asking to the first token; None if none came."""
        first = min((pieces[0][0] for pieces in self.tokens.values()), default=None)
        return None if first is None else first - self.arrival

    @property
    def latency(self) -> float | None:
        """Seconds from asking to the end; None if it has not ended."""
        return None if self.end is None else self.end - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between a token and the one before it, of all answers one after another.

        Tokens that came together share the time since the piece before them; those of the first piece have no gap.
        """
        return [gap for pieces in self.tokens.values() for gap in _gaps(pieces)]


def _gaps(pieces: Sequence[tuple[float, int]]) -> Iterable[float]:
    for (before, _), (now, count) in pairwise(pieces):
        yield from [(now - before) / count] * count


@dataclass(frozen=True)
class Percentiles:
    """A set of measured values, ascending. Everything is NaN of an empty one."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Percentiles:
        """Of the values that are there."""
        return cls(tuple(sorted(value for value in values if value is not None)))

    def __len__(self) -> int:
        return len(self.values)

    def at(self, share: float) -> float:
        """The value that `share` (0 to 1) of all are not above, interpolated linearly between neighbours."""
        if not self.values:
            return math.nan
        place = share * (len(self.values) - 1)
        low = int(place)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (place - low) * (self.values[high] - self.values[low])

    @property
    def p50(self) -> float:
        return self.at(0.5)

    @property
    def p90(self) -> float:
        return self.at(0.9)

    @property
    def p99(self) -> float:
        return self.at(0.99)

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    @property
    def smallest(self) -> float:
        return self.at(0.0)

    @property
    def largest(self) -> float:
        return self.at(1.0)


@dataclass(frozen=True)
class Summary:
    """All requests of a run. seconds: from the first arrival to the last end; the rest in seconds a request or token.

    num_answers: of all requests together. gap: between tokens. latency: from asking to the end. Rates count all
    requests and tokens over `seconds`.
    """

    num_requests: int
    num_answers: int
    num_prompt: int
    num_new: int
    seconds: float
    first_token: Percentiles
    gap: Percentiles
    latency: Percentiles

    @property
    def answer_length(self) -> float:
        """Generated tokens of an answer, on average; NaN of an empty run."""
        return self.num_new / self.num_answers if self.num_answers else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second; NaN of an empty run."""
        return self.num_new / self.seconds if self.seconds > 0 else math.nan

    @property
    def requests_per_second(self) -> float:
        return self.num_requests / self.seconds if self.seconds > 0 else math.nan


def summarise(timelines: Iterable[Timeline]) -> Summary:
    """The figures of a run, over all of its requests."""
    lines = list(timelines)
    ends = [line.end for line in lines if line.end is not None]
    return Summary(
        num_requests=len(lines),
        num_answers=sum(line.num_answers for line in lines),
        num_prompt=sum(line.num_prompt for line in lines),
        num_new=sum(line.num_new for line in lines),
        seconds=max(ends) - min(line.arrival for line in lines) if ends else 0.0,
        first_token=Percentiles.of(line.first_token for line in lines),
        gap=Percentiles.of(gap for line in lines for gap in line.gaps),
        latency=Percentiles.of(line.latency for line in lines),
    )


class Watched:
    """An engine that is watched: `most_together` is how many requests it ran at once, at most; others waited."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.most_together = 0

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def step(self) -> list[Output]:
        """A step of the engine. Together are those that run after it and those that it ended."""
        outputs = self._engine.step()
        running = {each.request.id for each in self._engine.scheduler.running if each.status is Status.RUNNING}
        ended = {output.request_id for output in outputs if output.finish_reason is not None}
        self.most_together = max(self.most_together, len(running | ended))
        return outputs


def run_timed(
    engine: Steps,
    arrivals: Iterable[tuple[float, Request]],
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[float], None] = time.sleep,
    listen: Callable[[Output], None] | None = None,
    most_at_once: int | None = None,
) -> list[Timeline]:
    """Serves requests that arrive over time, and returns a timeline for each, in the order given.

    arrivals: (seconds from the start, request); 0 is at once. listen: is given every output when it comes.
    most_at_once: how many requests the engine may hold; others wait outside, and their time runs from their arrival all
    the same. clock: seconds; wait: sleeps for so many. Times on the timelines count from the start.
    Raises ValueError, as `engine.submit` does, for a request that can never be served.
    """
    given = list(arrivals)
    if most_at_once is not None and most_at_once < 1:
        raise ValueError(f"{most_at_once} requests at once; it must be 1 or more")
    timelines = {request.id: Timeline(len(request.prompt), at, request.params.n) for at, request in given}
    queue = deque(sorted(given, key=lambda arrival: arrival[0]))
    num_inside, start = 0, clock()
    while queue or engine.has_work:
        now = clock() - start
        while queue and queue[0][0] <= now and (most_at_once is None or num_inside < most_at_once):
            engine.submit(queue.popleft()[1])
            num_inside += 1
        if not engine.has_work:
            wait(queue[0][0] - now)
            continue
        outputs = engine.step()
        now = clock() - start
        for output in outputs:
            line = timelines[output.request_id]
            line.add(now, output)
            num_inside -= line.end is not None
            if listen is not None:
                listen(output)
    return list(timelines.values())
