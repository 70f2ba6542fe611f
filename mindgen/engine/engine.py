"""The loop on rank 0: requests in, outputs out, up to one step in flight for every pipeline stage."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor

from mindgen.engine.answers import Answer, News, make_answer
from mindgen.engine.batch import Batch, make_batch, scored_positions
from mindgen.engine.request import SEED_LIMIT, Output, Request, Sequence, Status
from mindgen.engine.results import read_row
from mindgen.engine.scheduler import Scheduler, Step
from mindgen.engine.transcript import Ends, TextTools


class StepRunner(Protocol):
    """What the engine asks of a runner; results come back in the order of the launches."""

    def launch(self, batch: Batch) -> None: ...

    def collect(self) -> Tensor: ...

    def stop(self) -> None: ...


class Engine:
    """Continuous batching: `submit` requests at any time, `step` for news, `abort` at any time.

    tokenizer: makes text; without one, outputs hold token ids only. eos_ids: the model's end-of-text tokens.
    vocab_size: if given, prompts are checked against it. tools: how text is made, if not by mindgen.text.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        tokenizer: Any | None = None,
        eos_ids: Iterable[int] = (),
        vocab_size: int | None = None,
        tools: TextTools | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size = vocab_size
        self._tools = TextTools.of(tokenizer) if tools is None and tokenizer is not None else tools
        self._answers: dict[int, Answer] = {}
        self._in_flight: deque[Step] = deque()
        self._news: list[Output] = []

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do or to tell."""
        return bool(self.scheduler.has_work or self._in_flight or self._news)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError, naming the numbers, for one that can never be served."""
        self._check(request)
        params = request.params
        ends = Ends.of(params, self.eos_ids)
        seed = secrets.randbelow(SEED_LIMIT) if params.seed is None else params.seed
        sequence = Sequence.start(request, seed, ends.ids, self._bad_words(request))
        answer = make_answer(request, ends, self._tools)
        self.scheduler.submit(sequence)
        self._answers[request.id] = answer

    def step(self) -> list[Output]:
        """Fill the pipeline, wait for the oldest step in flight, and tell what is new. May be empty."""
        while len(self._in_flight) < self.scheduler.num_stages and (step := self.scheduler.schedule()):
            self._in_flight.append(step)
            self.runner.launch(make_batch(step, self.scheduler.block_size))
        if self._in_flight:
            rows = self.runner.collect().tolist()
            self._news += self._commit(self._in_flight.popleft(), rows)
        news, self._news = self._news, []
        return news

    def abort(self, request_id: int) -> bool:
        """End a request, whether it waits, runs or is in flight; the next `step` reports `abort` for what had not
        ended. False if there is no such request (any more)."""
        answer = self._answers.pop(request_id, None)
        if answer is None:
            return False
        self.scheduler.abort(request_id)
        self._news += answer.close("abort")
        return True

    def run(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Submit `requests` and yield outputs until nothing is left to do, of requests submitted earlier too."""
        for request in requests:
            self.submit(request)
        while self.has_work:
            yield from self.step()

    def close(self) -> None:
        """Wait for steps in flight, drop their results, and stop the other ranks."""
        for step in self._in_flight:
            self.runner.collect()
            self.scheduler.commit(step)
        self._in_flight.clear()
        self.runner.stop()

    def _commit(self, step: Step, rows: list[list[float]]) -> list[Output]:
        self.scheduler.commit(step)
        self._read_scores(step, rows)
        outputs = []
        for request_id, news in _by_request(step, rows).items():
            answer = self._answers[request_id]
            outputs += answer.take(news, self.scheduler)
            if answer.done:
                del self._answers[request_id]
        return outputs

    def _read_scores(self, step: Step, rows: list[list[float]]) -> None:
        """What prompts were scored goes to their answers; its rows lie behind those that were drawn."""
        at = sum(chunk.num_samples for chunk in step.chunks)
        for chunk in step.chunks:
            positions, sequence = scored_positions(chunk), chunk.sequence
            if positions and sequence.status is not Status.FINISHED:
                num_top = sequence.request.params.num_prompt_top or 0
                found = [read_row(row, num_top) for row in rows[at : at + len(positions)]]
                self._answers[sequence.request.id].read_prompt(found)
                sequence.num_scored = positions.stop - 1
            at += len(positions)

    def _check(self, request: Request) -> None:
        params = request.params
        if self.vocab_size is not None:
            self._check_tokens(f"the prompt of request {request.id}", request.prompt)
            self._check_tokens(f"the logit_bias of request {request.id}", dict(params.logit_bias))
            self._check_tokens(f"stop_token_ids of request {request.id}", params.stop_token_ids)
        if params.stop and self._tools is None:
            raise ValueError(f"request {request.id} has stop strings, which need a tokenizer; use stop_token_ids")
        if params.bad_words and (self._tools is None or self._tools.encode is None):
            raise ValueError(f"request {request.id} has bad_words, which need a tokenizer; use logit_bias")

    def _check_tokens(self, name: str, tokens: Iterable[int]) -> None:
        size = self.vocab_size or 0
        foreign = next((token for token in tokens if not 0 <= token < size), None)
        if foreign is not None:
            raise ValueError(f"{name} has token id {foreign}; the model's vocabulary goes from 0 to {size - 1}")

    def _bad_words(self, request: Request) -> list[tuple[int, ...]]:
        words = request.params.bad_words
        return [way for word in words for way in self._tools.ways_to_write(word)] if self._tools else []


def _by_request(step: Step, rows: list[list[float]]) -> dict[int, News]:
    """What was drawn for the sequences that were not ended meanwhile."""
    found: dict[int, News] = {}
    left = iter(rows)
    for chunk in step.chunks:
        drawn = [read_row(next(left), chunk.sequence.row.num_top) for _ in range(chunk.num_samples)]
        if drawn and chunk.sequence.status is Status.RUNNING:
            found.setdefault(chunk.sequence.request.id, []).append((chunk.sequence, drawn))
    return found
