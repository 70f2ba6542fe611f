"""What requests cost in time, on a clock that only moves when it is told to."""

from __future__ import annotations

import math
from collections import deque

import pytest

from mindgen.commands.latency import Percentiles, Timeline, Watched, run_timed, summarise
from mindgen.engine.blocks import BlockPool
from mindgen.engine.engine import Engine
from mindgen.engine.request import Output, Request, SamplingParams, Sequence
from mindgen.engine.scheduler import Scheduler
from tests.engine.fakes import FakeRunner, hashed_logits


class Clock:
    """Seconds that pass by `wait` and by the steps of an engine."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class OneAtATime:
    """Answers requests in turn: a step takes a second and gives `pace` tokens of one answer."""

    def __init__(self, clock: Clock, pace: int = 1) -> None:
        self.clock, self.pace = clock, pace
        self.left: deque[tuple[Request, int, int]] = deque()
        self.most = 0

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def submit(self, request: Request) -> None:
        self.left += [(request, index, request.params.max_new_tokens) for index in range(request.params.n)]
        self.most = max(self.most, len({request.id for request, _, _ in self.left}))

    def step(self) -> list[Output]:
        self.clock.now += 1
        request, index, left = self.left.popleft()
        new = min(self.pace, left)
        if left > new:
            self.left.appendleft((request, index, left - new))
        return [Output(request.id, index, (7,) * new, finish_reason=None if left > new else "length")]


def request(number: int, num_new: int, n: int = 1) -> Request:
    return Request(number, (1, 2, 3), SamplingParams(max_new_tokens=num_new, n=n))


def test_times_run_from_the_arrival_and_not_from_the_first_step() -> None:
    clock = Clock()
    first, second = run_timed(OneAtATime(clock), [(0, request(5, 3)), (1.5, request(2, 2))], clock, clock.wait)
    assert (first.first_token, first.gaps, first.latency) == (1, [1, 1], 3)
    assert (second.arrival, second.first_token, second.gaps, second.latency) == (1.5, 2.5, [1], 3.5)
    assert clock.waits == []


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    clock = Clock()
    lines = run_timed(OneAtATime(clock), [(4.0, request(1, 1)), (0, request(0, 1))], clock, clock.wait)
    assert clock.waits == [3.0]
    assert [(line.arrival, line.end) for line in lines] == [(4.0, 5.0), (0, 1.0)]


def test_tokens_that_come_together_share_the_time() -> None:
    clock = Clock()
    (line,) = run_timed(OneAtATime(clock, pace=2), [(0, request(0, 5))], clock, clock.wait)
    assert line.num_new == 5 and line.first_token == 1
    assert line.gaps == [0.5, 0.5, 1.0]


def test_several_answers_end_with_the_last_and_have_gaps_of_their_own() -> None:
    clock = Clock()
    (line,) = run_timed(OneAtATime(clock), [(0, request(0, 2, n=3))], clock, clock.wait)
    assert (line.num_new, line.gaps, line.first_token, line.latency) == (6, [1, 1, 1], 1, 6)


@pytest.mark.parametrize("most", [1, 2, None])
def test_no_more_requests_at_once_than_allowed(most: int | None) -> None:
    clock = Clock()
    engine = OneAtATime(clock)
    lines = run_timed(engine, [(0, request(n, 2, n=2)) for n in range(5)], clock, clock.wait, most_at_once=most)
    assert engine.most == (most or 5)
    assert [line.latency for line in lines] == [4, 8, 12, 16, 20]


def test_none_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="0 requests at once"):
        run_timed(OneAtATime(Clock()), [(0, request(0, 1))], most_at_once=0)


def test_every_output_is_heard_when_it_comes() -> None:
    clock, heard = Clock(), []
    run_timed(
        OneAtATime(clock), [(0, request(3, 2))], clock, clock.wait, lambda output: heard.append(output.request_id)
    )
    assert heard == [3, 3]


def test_how_many_run_together_is_known_without_a_look_at_those_that_wait() -> None:
    class Unasked(Scheduler):
        @property
        def sequences(self) -> list[Sequence]:
            raise AssertionError("a list of all that wait, in the time that is measured")

    scheduler = Unasked(BlockPool(40, 4), max_sequences=3)
    watched = Watched(Engine(scheduler, FakeRunner(hashed_logits, 40, 4)))
    lines = run_timed(watched, [(0.0, request(number, 1 + number % 3)) for number in range(8)])
    assert watched.most_together == 3 and all(line.end is not None for line in lines)


def test_percentiles_are_interpolated_between_neighbours() -> None:
    values = Percentiles.of([4.0, None, 1.0, 2.0, 3.0, 5.0])
    assert len(values) == 5
    assert (values.smallest, values.p50, values.largest, values.mean) == (1, 3, 5, 3)
    assert (
        values.p90 == pytest.approx(4.6) and values.p99 == pytest.approx(4.96) and values.at(0.1) == pytest.approx(1.4)
    )
    assert all(math.isnan(value) for value in (Percentiles.of([]).p50, Percentiles.of([]).mean))


def test_a_summary_counts_from_the_first_arrival_to_the_last_end() -> None:
    clock = Clock()
    summary = summarise(run_timed(OneAtATime(clock), [(2, request(n, 4)) for n in range(2)], clock, clock.wait))
    assert (summary.num_requests, summary.num_prompt, summary.num_new, summary.seconds) == (2, 6, 8, 8)
    assert (summary.num_answers, summary.answer_length) == (2, 4) and math.isnan(summarise([]).answer_length)
    assert (summary.tokens_per_second, summary.requests_per_second) == (1.0, 0.25)
    assert summary.first_token.values == (1, 5) and summary.latency.values == (4, 8) and len(summary.gap) == 6


def test_what_never_came_is_left_out() -> None:
    line = Timeline(num_prompt=3)
    line.add(2.0, Output(0, 0, finish_reason="error", message="no logits"))
    summary = summarise([line])
    assert (line.first_token, line.gaps, line.latency, line.reasons) == (None, [], 2.0, {0: "error"})
    assert not len(summary.first_token) and math.isnan(summarise([]).tokens_per_second)
