"""What becomes of sampled tokens: independent samples that go on one by one, the best of them, or beams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Protocol

from mindgen.engine.beam import Beam, BeamSearch
from mindgen.engine.request import FinishReason, Output, Request, Sequence, TokenLogprob
from mindgen.engine.results import Sampled
from mindgen.engine.scheduler import Scheduler
from mindgen.engine.transcript import Ends, TextTools, Transcript

News = list[tuple[Sequence, list[Sampled]]]  # sequences of one request and what was drawn for each

_NO_LOGITS = "no usable logits at position {}: the model gave NaN, or nothing above -inf that may be drawn"
_NO_BEAM = "the filters left too few tokens for this many beams"


def make_answer(request: Request, ends: Ends, tools: TextTools | None) -> Answer:
    """The answer to a request, before anything is known of it."""
    if request.params.num_beams > 1:
        return Beams(request, ends, tools)
    return (Samples if request.params.best_of is None else BestOf)(request, ends, tools)


class Answer(Protocol):
    """The answer to one request, as it grows."""

    @property
    def done(self) -> bool:
        """True once nothing more will come."""

    def read_prompt(self, scored: list[Sampled]) -> None:
        """Log-probabilities of the next tokens of the prompt, from its second token on."""

    def take(self, news: News, scheduler: Scheduler) -> list[Output]:
        """Let the sequences go on with what was drawn for them, or end."""

    def close(self, reason: FinishReason, message: str | None = None) -> list[Output]:
        """Final outputs for everything that has not ended yet. The scheduler is told by others."""


class Samples:
    """Independent samples: `n` of them, or as many as the best ones are wanted of."""

    def __init__(self, request: Request, ends: Ends, tools: TextTools | None) -> None:
        params = request.params
        self.request = request
        self.sums = [0.0] * params.num_drawn  # of log-probabilities, where they are wanted
        self._scores = [TokenLogprob(request.prompt[0], None)]
        self._going_on = {index: Transcript(params, ends, tools) for index in range(params.num_drawn)}
        prompt = request.prompt if params.echo else ()
        self._openings = {index: transcript.begin(prompt) for index, transcript in self._going_on.items()}

    @property
    def done(self) -> bool:
        return not self._going_on

    def read_prompt(self, scored: list[Sampled]) -> None:
        prompt = self.request.prompt
        for row in scored:
            token = prompt[len(self._scores)]
            logprob = None if row.token is None else row.logprob
            self._scores.append(TokenLogprob(token, logprob, _pairs(row)))

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
        self.sums[sequence.index] += sampled.logprob or 0.0
        text, reason = self._going_on[sequence.index].push(sampled.token)
        if reason:
            scheduler.finish(sequence)
            del self._going_on[sequence.index]
        logprobs = self._logprobs(sampled.token, sampled)
        return self._opened(Output(self.request.id, sequence.index, (sampled.token,), text, reason, logprobs))

    def _end(self, index: int, reason: FinishReason, message: str | None) -> Output:
        text = self._going_on.pop(index).close()
        return self._opened(Output(self.request.id, index, text=text, finish_reason=reason, message=message))

    def _logprobs(self, token: int, sampled: Sampled) -> tuple[TokenLogprob, ...] | None:
        if self.request.params.logprobs is None:
            return None
        return (TokenLogprob(token, sampled.logprob, _pairs(sampled)),)

    def _opened(self, output: Output) -> Output:
        """The first piece of a sequence also tells what was asked of the prompt."""
        if output.index not in self._openings:
            return output
        text, params = self._openings.pop(output.index) + output.text, self.request.params
        if params.prompt_logprobs is not None:
            output = replace(output, prompt_logprobs=self._prompt_logprobs(params.prompt_logprobs))
        if not params.echo:
            return output
        if params.logprobs is not None:
            output = replace(output, logprobs=self._prompt_logprobs(params.logprobs) + (output.logprobs or ()))
        return replace(output, token_ids=self.request.prompt + output.token_ids, text=text)

    def _prompt_logprobs(self, num_top: int) -> tuple[TokenLogprob, ...]:
        return tuple(replace(score, top=score.top[:num_top]) for score in self._scores)


class BestOf:
    """The `n` samples with the largest sums of log-probabilities. They come out at the end, best first."""

    def __init__(self, request: Request, ends: Ends, tools: TextTools | None) -> None:
        self.request = request
        self._samples = Samples(request, ends, tools)
        self._pieces: list[list[Output]] = [[] for _ in self._samples.sums]

    @property
    def done(self) -> bool:
        return self._samples.done

    def read_prompt(self, scored: list[Sampled]) -> None:
        self._samples.read_prompt(scored)

    def take(self, news: News, scheduler: Scheduler) -> list[Output]:
        for output in self._samples.take(news, scheduler):
            self._pieces[output.index].append(output)
        return self._best() if self.done else []

    def close(self, reason: FinishReason, message: str | None = None) -> list[Output]:
        self._samples.close(reason, message)
        return [_nothing(self.request, index, reason, message) for index in range(self.request.params.n)]

    def _best(self) -> list[Output]:
        """Those that ended with an error come last; of equal ones the first drawn is the better one."""
        whole = [_joined(pieces) for pieces in self._pieces]
        order = sorted(whole, key=lambda output: (output.finish_reason == "error", -self._samples.sums[output.index]))
        best = order[: self.request.params.n]
        return [replace(one, index=rank, score=self._samples.sums[one.index]) for rank, one in enumerate(best)]


def _joined(pieces: list[Output]) -> Output:
    """All pieces of a sequence as one."""
    return replace(
        pieces[-1],
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        text="".join(piece.text for piece in pieces),
        logprobs=_all_logprobs(pieces),
        prompt_logprobs=pieces[0].prompt_logprobs,
    )


def _all_logprobs(pieces: Iterable[Output]) -> tuple[TokenLogprob, ...] | None:
    known = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return tuple(chain.from_iterable(known)) if known else None


def _pairs(sampled: Sampled) -> tuple[tuple[int, float], ...]:
    return tuple((candidate.token, candidate.logprob) for candidate in sampled.top)


def _nothing(request: Request, index: int, reason: FinishReason, message: str | None) -> Output:
    return Output(request.id, index, finish_reason=reason, message=message)


class Beams:
    """A beam search. Nothing is certain before its end, when the best `n` come out, best first."""

    def __init__(self, request: Request, ends: Ends, tools: TextTools | None) -> None:
        params = request.params
        self.request = request
        self.done = False
        self._ends, self._tools = ends, tools
        self._search = BeamSearch(params.num_beams, params.length_penalty, ends.ids, params.max_new_tokens)

    def read_prompt(self, scored: list[Sampled]) -> None:
        raise AssertionError("beam search reports no log-probabilities of the prompt")

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
        return [_nothing(self.request, index, reason, message) for index in range(self.request.params.n)]

    def _go_on(self, sequences: list[Sequence], scheduler: Scheduler) -> None:
        running = self._search.running
        children = scheduler.replace([sequences[beam.parent] for beam in running])
        for child, beam in zip(children, running, strict=True):
            child.tokens.append(beam.tokens[-1])

    def _best(self) -> list[Output]:
        self.done = True
        wanted = self.request.params.n
        outputs = [self._ended(index, beam) for index, beam in enumerate(self._search.ended[:wanted])]
        return outputs + [_nothing(self.request, index, "error", _NO_BEAM) for index in range(len(outputs), wanted)]

    def _ended(self, index: int, beam: Beam) -> Output:
        reason = self._ends.reason(beam.tokens[-1])
        prompt = self.request.prompt if self.request.params.echo else ()
        text = self._text([*prompt, *(beam.tokens[:-1] if reason else beam.tokens)])
        return Output(self.request.id, index, prompt + beam.tokens, text, reason or "length", score=beam.score)

    def _text(self, tokens: list[int]) -> str:
        if self._tools is None:
            return ""
        detokenizer = self._tools.detokenizer()
        return detokenizer.push(tokens) + detokenizer.finish()
