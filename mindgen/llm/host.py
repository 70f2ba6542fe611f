"""An engine on a thread of its own, inside somebody's program.

All that computes, connects or waits for other ranks happens on that thread, so that neither Ctrl-C nor a slow caller
can tear through a step in which other ranks take part. Signal handlers stay as they are. The program gets exceptions
where a command would end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from mindgen.engine.request import Request
from mindgen.llm.desk import Desk
from mindgen.llm.news import News, digest
from mindgen.parallel.launch import LocalRanks, Ranks, join_ranks, start_local_ranks, under_launcher
from mindgen.parallel.place import read_place
from mindgen.startup.rank import PROGRAM, surroundings, tell
from mindgen.startup.ranks import ready_rank, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from mindgen.config import EngineConfig
    from mindgen.engine.engine import Engine
    from mindgen.engine.runner import Runner
    from mindgen.startup.opened import Opened, TokenizerChoice

Command = Callable[["Engine"], None]
_PATIENCE = 20  # seconds for the thread's end after a rank was lost, in which it may wait for a device in vain
CLOSED = "this LLM is closed; make a new one"


class Host:
    """Starts at once; `model` waits until it is ready. `close` from any thread, `abandon` where waiting is no option.

    Under a launcher every rank has one. Rank 0's engine serves; the others are told every output, and whoever asks
    there waits for what rank 0 was asked. They are to ask the same things in the same order.
    """

    def __init__(self, config: EngineConfig, choice: TokenizerChoice) -> None:
        self.desk = Desk()
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._model: Future[tuple[Opened, tuple[str, ...]]] = Future()
        self._ranks: Ranks | None = None
        self._abandoned = threading.Event()
        self._connected = True  # or abandoned before it was
        self._threads: int | None = None  # torch's in this process, until they are put back
        self._digests: dict[int, str] = {}  # of requests that only this rank, or only rank 0, knows of yet
        self._digesting = threading.Lock()
        self._tell: Callable[[News], None] = _nobody
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._live, args=(config, choice), name="mindgen engine", daemon=True)
        self._thread.start()

    def model(self) -> tuple[Opened, tuple[str, ...]]:
        """The model, with sizes settled, and lines on how it runs. Raises ValueError or OSError for what is wrong with
        it, PeerLost for a rank that was lost meanwhile."""
        return self._model.result()

    @property
    def follows(self) -> bool:
        """Whether another process decides what is computed."""
        return self._ranks is not None and self._ranks.place.rank > 0

    def ask(self, requests: Sequence[Request]) -> None:
        """Hands requests, whose numbers are from the desk, to the engine: all of them, or none if one is refused."""
        if self.follows:
            self._compare((request.id, digest(request)) for request in requests)
        else:
            self._commands.put(partial(self._submit, requests))

    def abort(self, numbers: Sequence[int]) -> None:
        """Ends what has not ended of these; rank 0's word counts, where another rank decides."""
        if not self.follows:
            self._commands.put(lambda engine: _abort(engine, numbers))

    def close(self) -> None:
        """Ends the engine and its ranks, and waits until they have ended."""
        if os.getpid() != self._process:
            return  # a fork of the program: none of this is its own
        self._commands.put(None)
        if threading.current_thread() is self._thread:
            return  # collected by it
        patience = _PATIENCE
        while self._thread.is_alive() and patience:
            self._thread.join(1.0)
            patience -= self._ranks is not None and self._ranks.loss is not None

    def abandon(self) -> None:
        """Ends the ranks, and lets the thread find out by itself, which may take it as long as it reads weights."""
        import torch.distributed as dist

        self._connected = dist.is_initialized()
        self._abandoned.set()
        self._commands.put(None)
        if self._ranks is not None:
            self._ranks.loss = self._ranks.loss or CLOSED  # for a roll call that waits in vain
            self._ranks.kill_children()
        self._thread.join(1.0)
        self._put_threads_back()

    def _live(self, config: EngineConfig, choice: TokenizerChoice) -> None:
        try:
            self._run(config, choice)
            self._end(RuntimeError(CLOSED))
        except BaseException as error:  # the thread's last words, whatever they are: somebody waits for them
            self._end(_as_told(error))

    def _end(self, error: Exception) -> None:
        self.desk.fail(error)
        with suppress(Exception):  # it was ready
            self._model.set_exception(error)

    def _run(self, config: EngineConfig, choice: TokenizerChoice) -> None:
        model, error = _open(config, choice)
        size = read_place(os.environ).world_size
        if self._abandoned.is_set() or (size == 1 and model is None):
            raise ValueError(error)
        size = size if model is None or size > 1 else world_size(model.config)
        with self._torch_as_before(size), self._become_rank(config, choice, size) as ranks:
            self._ranks = ranks
            if self._abandoned.is_set():
                ranks.kill_children()
                raise RuntimeError(CLOSED)
            with ready_rank(ranks, model, error) as (settled, runner):
                self._serve(settled, runner)

    @contextmanager
    def _torch_as_before(self, size: int) -> Iterator[None]:
        """torch.distributed exists once in a process, and so does its number of threads."""
        import torch
        import torch.distributed as dist

        if size > 1 and dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is in use in this process, by another LLM of several ranks or by your program, "
                f"and an LLM of {size} ranks needs it for itself; close the other one first, or use one rank"
            )
        self._threads = torch.get_num_threads()
        try:
            yield
        finally:
            self._put_threads_back()
            if size > 1 and self._connected and dist.is_initialized():
                dist.destroy_process_group()

    def _put_threads_back(self) -> None:
        """Once: a thread that was abandoned and ends late would disturb the next LLM."""
        import torch

        threads, self._threads = self._threads, None
        if threads is not None:
            torch.set_num_threads(threads)

    @contextmanager
    def _become_rank(self, config: EngineConfig, choice: TokenizerChoice, size: int) -> Iterator[Ranks]:
        if under_launcher(os.environ):
            yield join_ranks(os.environ, on_loss=self._lose, is_guest=True)
        elif size == 1:
            yield Ranks()
        else:
            told, environ = tell(config, choice.folder), surroundings(os.environ)
            ranks = start_local_ranks(size, told, environ, PROGRAM, self._lose, is_guest=True)
            with _ended(ranks):
                yield ranks

    def _lose(self, reason: str) -> None:
        """Called by a thread that noticed; the engine's own may be waiting for the lost rank, and will notice too."""
        from mindgen.parallel.group import PeerLost

        self._end(PeerLost(f"{reason}; this LLM cannot go on, make a new one"))

    def _serve(self, model: Opened, runner: Runner) -> None:
        from mindgen.startup.ready import describe, make_engine

        notes = (*model.notes, *describe(model, runner))
        if self.follows:
            self._model.set_result((model, notes))
            runner.follow(self._hear)
            return
        engine = make_engine(model, runner)
        if under_launcher(os.environ) and runner.world.topology.world_size > 1:
            self._tell = _telling(runner)
        self._model.set_result((model, notes))
        while self._obey(engine):
            outputs = engine.step()
            if outputs:
                self._tell(News(tuple(outputs)))
                self.desk.post(outputs)
        self.desk.fail(RuntimeError(CLOSED))
        engine.close()

    def _obey(self, engine: Engine) -> bool:
        """Does what was asked meanwhile, and waits for it while there is nothing else to do; False to end."""
        while not (self._commands.empty() and engine.has_work):
            command = self._commands.get()
            if command is None:
                return False
            command(engine)
        return True

    def _submit(self, requests: Sequence[Request], engine: Engine) -> None:
        refusal = _submit_all(requests, engine)
        asked = tuple((request.id, digest(request)) for request in requests)
        if refusal is None:
            self._tell(News(asked=asked))
        else:
            numbers = tuple(request.id for request in requests)
            _abort(engine, numbers)
            self._tell(News(asked=asked, refused=numbers, reason=str(refusal)))
            self.desk.refuse(numbers, refusal)

    def _hear(self, words: Tensor) -> None:
        """What rank 0 tells the others."""
        news = News.unpack(words)
        self._compare(news.asked)
        if news.refused:
            self.desk.refuse(news.refused, ValueError(news.reason))
        self.desk.post(news.outputs)

    def _compare(self, digests: Iterable[tuple[int, str]]) -> None:
        """What is asked here with what rank 0 was asked, whichever is known first."""
        for number, mine in digests:
            with self._digesting:
                other = self._digests.pop(number, None)
                if other is None:
                    self._digests[number] = mine
            if other not in (None, mine):
                reason = "the ranks ask different things; under a launcher each must make the same calls in one order"
                self.desk.refuse([number], RuntimeError(reason))


def _open(config: EngineConfig, choice: TokenizerChoice) -> tuple[Opened | None, str | None]:
    """The model with its tokenizer, if it has one; or what is wrong, of which other ranks may be waiting to hear."""
    import mindgen.startup.ready  # noqa: F401  # slow, and other ranks wait once they have begun
    from mindgen.startup.opened import open_model, with_tokenizer

    try:
        opened = open_model(config, beside=choice.folder)
        return with_tokenizer(opened, choice, needed=choice.prompt_type is not None), None
    except (ValueError, OSError) as error:
        return None, str(error)


@contextmanager
def _ended(ranks: LocalRanks) -> Iterator[None]:
    """Whatever happens inside, the ranks have ended afterwards."""
    patience = 1.0
    try:
        yield
        patience = 10.0
    finally:
        ranks.close(patience)


def _submit_all(requests: Sequence[Request], engine: Engine) -> Exception | None:
    """Why one of them, named by its place among these, was refused, if one was; those before it are submitted.

    Whatever one caller did wrong is no reason to end the engine for all.
    """
    for place, request in enumerate(requests):
        name = f"prompt {place}" if len(requests) > 1 else "the request"
        try:
            engine.submit(request)
        except ValueError as error:
            return ValueError(request.named(str(error), name))
        except Exception as error:
            return RuntimeError(_failed(name, error))
    return None


def _telling(runner: Runner) -> Callable[[News], None]:
    return lambda news: runner.speak(news.pack())


def _nobody(news: News) -> None:
    """Ranks that were started from here have nobody who would want to know."""


def _abort(engine: Engine, numbers: Iterable[int]) -> None:
    for number in numbers:
        with suppress(TypeError):  # what cannot be a number is nobody's
            engine.abort(number)


def _as_told(error: BaseException) -> Exception:
    """The reason as a user should get it, of a class that can be made anew from its message for each who asks."""
    from mindgen.parallel.group import PeerLost
    from mindgen.parallel.world import RankError

    if isinstance(error, RankError):
        return ValueError(str(error))
    for kind in (PeerLost, ValueError, OSError, RuntimeError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(_failed("the engine", error))


def _failed(what: str, error: BaseException) -> str:
    return f"{what} failed: {type(error).__name__}: {error}"
