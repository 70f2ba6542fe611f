"""What becomes of sampled tokens: independent samples that go on one by one, or beams that go on together."""

from __future__ import annotations

from typing import Protocol

from mindgen.engine.beam import Beam, BeamSearch
from mindgen.engine.request import FinishReason, Output, Request, Sequence, TokenLogprob
from mindgen.engine.results import Sampled
from mindgen.engine.scheduler import Scheduler
from mindgen.engine.transcript import Ends, TextTools, Transcript

News = list[tuple[Sequence, list[Sampled]]]  # sequences of one request and what was drawn for each

_NO_LOGITS = "the model gave no usable logits (NaN, or nothing above -inf) at position {}"
_NO_BEAM = "the filters left too few tokens for this many beams"


class Answer(Protocol):
    """The answer to one request, as it grows."""

    @property
    def done(self) -> bool:
        """True once nothing more will come."""

    def take(self, news: News, scheduler: Scheduler) -> list[Output]:
        """Let the sequences go on with what was drawn for them, or end."""

    def close(self, reason: FinishReason, message: str | None = None) -> list[Output]:
        """Final outputs for everything that has not ended yet. The scheduler is told by others."""


class Samples:
    """`n` independent samples."""

    def __init__(self, request: Request, ends: Ends, tools: TextTools | None) -> None:
        self.request = request
        self._going_on = {index: Transcript(request.params, ends, tools) for index in range(request.params.n)}

    @property
    def done(self) -> bool:
        return not self._going_on

    def take(self, news: News, scheduler: Scheduler) -> list[Output]:
        return [
            self._continue(sequence, sampled, scheduler)
            for first, drawn in news
            for sequence, sampled in zip(scheduler.split(first), drawn, strict=True)
        ]

    def close(self, reason: FinishReason, message: str | None = None) -> list[Output]:
        return [self._end(index, reason, message) for index in list(self._going_on)]

    def _continue(self, sequence: Sequence, sampled: Sampled, scheduler: Scheduler) -> Output:
        if sampled.token is None:
            scheduler.finish(sequence)
            return self._end(sequence.index, "error", _NO_LOGITS.format(len(sequence.tokens)))
        sequence.tokens.append(sampled.token)
        text, reason = self._going_on[sequence.index].push(sampled.token)
        if reason:
            scheduler.finish(sequence)
            del self._going_on[sequence.index]
        logprobs = self._logprobs(sampled.token, sampled)
        return Output(self.request.id, sequence.index, (sampled.token,), text, reason, logprobs)

    def _end(self, index: int, reason: FinishReason, message: str | None) -> Output:
        text = self._going_on.pop(index).close()
        return Output(self.request.id, index, text=text, finish_reason=reason, message=message)

    def _logprobs(self, token: int, sampled: Sampled) -> tuple[TokenLogprob, ...] | None:
        if self.request.params.logprobs is None:
            return None
        top = tuple((candidate.token, candidate.logprob) for candidate in sampled.top)
        return (TokenLogprob(token, sampled.logprob, top),)


class Beams:
    """A beam search. Nothing is certain before its end, when the best `n` come out, best first."""

    def __init__(self, request: Request, ends: Ends, tools: TextTools | None) -> None:
        params = request.params
        self.request = request
        self.done = False
        self._ends, self._tools = ends, tools
        self._search = BeamSearch(params.num_beams, params.length_penalty, ends.ids, params.max_new_tokens)

    def take(self, news: News, scheduler: Scheduler) -> list[Output]:
        sequences = [sequence for sequence, _ in news]
        rows = [drawn[0] for _, drawn in news]
        if any(row.token is None for row in rows):
            scheduler.abort(self.request.id)
            return self.close("error", _NO_LOGITS.format(len(sequences[0].tokens)))
        self._search.advance([row.top for row in rows])
        if self._search.done:
            scheduler.abort(self.request.id)
            return self._best()
        self._go_on(sequences, scheduler)
        return []

    def close(self, reason: FinishReason, message: str | None = None) -> list[Output]:
        self.done = True
        return [self._nothing(index, reason, message) for index in range(self.request.params.n)]

    def _go_on(self, sequences: list[Sequence], scheduler: Scheduler) -> None:
        running = self._search.running
        children = scheduler.replace([sequences[beam.parent] for beam in running])
        for child, beam in zip(children, running, strict=True):
            child.tokens.append(beam.tokens[-1])

    def _best(self) -> list[Output]:
        self.done = True
        wanted = self.request.params.n
        outputs = [self._ended(index, beam) for index, beam in enumerate(self._search.ended[:wanted])]
        return outputs + [self._nothing(index, "error", _NO_BEAM) for index in range(len(outputs), wanted)]

    def _ended(self, index: int, beam: Beam) -> Output:
        reason = self._ends.reason(beam.tokens[-1])
        text = self._text(list(beam.tokens[:-1] if reason else beam.tokens))
        return Output(self.request.id, index, beam.tokens, text, reason or "length", score=beam.score)

    def _text(self, tokens: list[int]) -> str:
        if self._tools is None:
            return ""
        detokenizer = self._tools.detokenizer()
        return detokenizer.push(tokens) + detokenizer.finish()

    def _nothing(self, index: int, reason: FinishReason, message: str | None) -> Output:
        return Output(self.request.id, index, finish_reason=reason, message=message)
