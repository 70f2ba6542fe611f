"""Outputs of the engine put together again: what became of a prompt, as far as it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from mindgen.engine.request import FinishReason, Output, TokenLogprob


@dataclass
class Sample:
    """One answer. What its fields mean is said at `Output`; `logprobs` is None where none were asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None
    message: str | None = None

    def add(self, output: Output) -> None:
        """Appends what is new."""
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason or self.finish_reason
        self.score = self.score if output.score is None else output.score
        self.message = output.message or self.message


@dataclass
class Result:
    """What a prompt got: `n` samples, of which the first is also at hand as `text`, `token_ids` and so on.

    prompt: None where token ids were given. prompt_logprobs: one for each of its tokens, where asked for. An answer
    that failed has the finish reason `error`, and `message` says why.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    samples: list[Sample]
    prompt_logprobs: list[TokenLogprob] | None = None

    def add(self, output: Output) -> None:
        """Appends what is new of one of the samples."""
        self.samples[output.index].add(output)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = list(output.prompt_logprobs)

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.samples[0].logprobs

    @property
    def message(self) -> str | None:
        return self.samples[0].message
