"""`LLM`: a model as a Python object, over as many ranks as it wants."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, overload

from mindgen.engine.request import Output, SamplingParams
from mindgen.llm.call import Call, Progress, seldom
from mindgen.llm.host import Host
from mindgen.llm.questions import (
    Conversation,
    Params,
    Prompt,
    Prompts,
    check_conversation,
    check_single,
    is_conversation,
    is_single,
    make_config,
    make_questions,
)
from mindgen.llm.result import Result
from mindgen.startup.opened import TokenizerChoice

if TYPE_CHECKING:
    from mindgen.config import EngineConfig
    from mindgen.llm.desk import Deliver
    from mindgen.text.tokenizer import Tokenizer


class LLM:
    """A model that answers, from any number of threads and tasks at once.

    model: a Hugging Face folder or a Megatron directory of any TP x PP, or a whole EngineConfig. options: the fields
    of EngineConfig. tokenizer: a folder whose tokenizer is to be used instead of the model's own. prompt_type: the name
    of a layout of conversations (`llama2`, `qwen`, ...: those of --prompt-type), instead of the tokenizer's template.

    With `tensor_parallel_size` x `pipeline_parallel_size` above one it starts the other ranks as processes of their
    own, which end with it: by `close`, at the end of a `with` block, when the object is collected, and with this
    process however that ends. Under torchrun every rank runs the same script and makes the same calls in the same
    order; rank 0 decides, and all get the same answers. Ranks of a host share its cores: torch's number of threads in
    this process is this rank's share until `close`, unless OMP_NUM_THREADS decides.

    Raises TypeError for an unknown option, ValueError for a bad value or a model that cannot be read, RuntimeError
    where another LLM of several ranks is open in this process. A rank that dies later is a PeerLost in every call that
    waits, and in all later ones; then make a new LLM.
    """

    def __init__(
        self,
        model: str | Path | EngineConfig,
        *,
        tokenizer: str | Path | TokenizerChoice | None = None,
        prompt_type: str | None = None,
        **options: Any,
    ) -> None:
        config = make_config(model, options)
        if not isinstance(tokenizer, TokenizerChoice):
            tokenizer = TokenizerChoice(None if tokenizer is None else str(tokenizer))
        if prompt_type is not None:
            tokenizer = replace(tokenizer, prompt_type=prompt_type)
        self._host = Host(config, tokenizer)
        self._finalizer = weakref.finalize(self, self._host.close)
        try:
            self._model, self.notes = self._host.model()
        except Exception:  # whatever it is, no rank is left behind
            self.close()
            raise
        except BaseException:  # Ctrl-C does not wait for weights that are being read
            self._finalizer.detach()
            self._host.abandon()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine and the other ranks, and waits for their end. Calls that are waiting get a RuntimeError."""
        self._finalizer()

    @property
    def config(self) -> EngineConfig:
        """How it runs, with every size settled."""
        return self._model.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where there is none, and prompts must be token ids."""
        return self._model.tokenizer

    @overload
    def generate(self, prompts: Prompt, params: Params = ..., *, progress: bool | None = ...) -> Result: ...
    @overload
    def generate(self, prompts: list[Any], params: Params = ..., *, progress: bool | None = ...) -> list[Result]: ...
    def generate(self, prompts: Prompts, params: Params = None, *, progress: bool | None = None) -> Any:
        """Answers to all prompts, in their order; to a single prompt, its Result.

        prompts: texts or sequences of token ids, or one of them. params: for all of them, or one for each; the answer
        also ends where the model's positions do. progress: a bar with tokens/s on standard error; None shows it on a
        terminal only. Ctrl-C aborts what runs.

        Raises ValueError for a bad prompt, before any of them runs.
        """
        if is_single(prompts):
            return self._answers([cast(Prompt, prompts)], params, progress)[0]
        return self._answers(cast(Sequence[Prompt], prompts), params, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Output]:
        """The answer to one prompt in pieces as they come: `text`, `token_ids`, and `finish_reason` with the last one.

        With n > 1 the pieces of all samples come mixed, told apart by `index`. Leaving the loop early aborts the rest.
        Raises ValueError for a bad prompt and for a list of them.
        """
        check_single(prompt, "stream", "generate")
        return self._pieces(make_questions([prompt], params, self._model))

    @overload
    def chat(self, messages: Conversation, params: Params = ..., *, progress: bool | None = ...) -> Result: ...
    @overload
    def chat(
        self, messages: Sequence[Conversation], params: Params = ..., *, progress: bool | None = ...
    ) -> list[Result]: ...
    def chat(
        self, messages: Conversation | Sequence[Conversation], params: Params = None, *, progress: bool | None = None
    ) -> Any:
        """As `generate`, of conversations, which `prompt_type` or else the tokenizer's chat template writes as prompts.

        messages: a conversation, which is a list of {"role": ..., "content": ...}, or a list of conversations.
        """
        return self.generate(cast(Any, self._chat_prompts(messages)), params, progress=progress)

    def chat_prompt(self, messages: Conversation) -> list[int]:
        """The token ids with which a conversation goes on, for `stream`. ValueError for what is no conversation, and
        where there is no template."""
        check_conversation(messages)
        if self.tokenizer is None:
            raise ValueError("a chat needs a tokenizer, and the model has none; name one with tokenizer=FOLDER")
        return self.tokenizer.apply_chat_template(cast(Any, messages))

    def abort(self, request_id: int) -> None:
        """Ends a request of another thread or task: its answer so far, with the finish reason `abort`.

        Under torchrun rank 0's word counts. What has ended already stays as it is. ValueError for what is no number.
        """
        if not isinstance(request_id, int):
            raise ValueError(f"{request_id!r} is no request's id; give the request_id of one Output or Result")
        self._host.abort([request_id])

    async def agenerate(self, prompts: Prompts, params: Params = None) -> Any:
        """As `generate`; any number of tasks may wait at once. A task that is cancelled aborts its requests."""
        single = is_single(prompts)
        asked = [cast(Prompt, prompts)] if single else cast(Sequence[Prompt], prompts)
        arrivals: asyncio.Queue[list[Output] | Exception] = asyncio.Queue()
        with Call(self._host, len(asked), seldom(_into(arrivals))) as call:
            call.ask(await asyncio.to_thread(make_questions, asked, params, self._model))
            while call.num_left:
                call.take(await arrivals.get())
        return call.results[0] if single else call.results

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Output]:
        """As `stream`. Leaving the loop early aborts the rest, at once if the iterator is closed (`aclose`)."""
        check_single(prompt, "astream", "agenerate")
        arrivals: asyncio.Queue[list[Output] | Exception] = asyncio.Queue()
        with Call(self._host, 1, _into(arrivals)) as call:
            call.ask(await asyncio.to_thread(make_questions, [prompt], params, self._model))
            while call.num_left:
                for output in call.take(await arrivals.get()):
                    yield output

    async def achat(self, messages: Conversation | Sequence[Conversation], params: Params = None) -> Any:
        """As `chat`, without blocking."""
        return await self.agenerate(await asyncio.to_thread(self._chat_prompts, messages), params)

    def _answers(self, prompts: Sequence[Prompt], params: Params, progress: bool | None) -> list[Result]:
        questions = make_questions(prompts, params, self._model)
        arrivals: SimpleQueue[list[Output] | Exception] = SimpleQueue()
        deliver = seldom(arrivals.put)
        with Progress.show(len(questions), progress) as bar, Call(self._host, len(questions), deliver) as call:
            call.ask(questions)
            while call.num_left:
                call.take(arrivals.get())
                bar.advance(call.num_tokens, len(questions) - call.num_left)
        return call.results

    def _pieces(self, questions: Sequence[Any]) -> Iterator[Output]:
        arrivals: SimpleQueue[list[Output] | Exception] = SimpleQueue()
        with Call(self._host, len(questions), arrivals.put) as call:
            call.ask(questions)
            while call.num_left:
                yield from call.take(arrivals.get())

    def _chat_prompts(self, messages: Conversation | Sequence[Conversation]) -> Prompts:
        if is_conversation(messages):
            return self.chat_prompt(cast(Conversation, messages))
        return [self.chat_prompt(conversation) for conversation in cast(Sequence[Conversation], messages)]


def _into(arrivals: asyncio.Queue[list[Output] | Exception]) -> Deliver:
    """Delivers from the engine's thread into a queue of the loop that runs here."""
    loop = asyncio.get_running_loop()

    def deliver(news: list[Output] | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any longer
            loop.call_soon_threadsafe(arrivals.put_nowait, news)

    return deliver
