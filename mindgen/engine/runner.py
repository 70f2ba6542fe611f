"""One rank's part of a step. Rank 0 launches, the other ranks follow; nobody else decides anything.

Control is a header (kind of message, length) and a packed batch. It goes from rank 0 to its tensor group by broadcast,
and from each rank to the same tensor rank of the next stage, ahead of the hidden states. Results go from the last
stage's tensor rank 0 back to rank 0. Waiting for another stage has no deadline, because a stage computes for as long
as its device needs; that the ranks are alive is the watchdog's to see.

Legend: T tokens in the step, R rows with results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mindgen.attention.backend import AttentionBackend
from mindgen.device import sampling_device
from mindgen.engine.batch import Batch
from mindgen.engine.kv_cache import KVCache
from mindgen.engine.results import NO_TOKEN, row_width
from mindgen.engine.sampler import sample, score
from mindgen.parallel.group import FOREVER
from mindgen.parallel.world import World

_STEP, _STOP, _WORDS = 1, 2, 3
_MOST_SCORED = 256  # rows of logits at a time


class Stage(Protocol):
    """The layers of one pipeline stage on one tensor rank."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def forward(self, inputs: Tensor, context: Any) -> Tensor:
        """Token ids [T] (first stage) or hidden states [T, hidden] in, hidden states [T, hidden] out."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] to [R, vocab] float32; last stage only, on all its tensor ranks together."""
        ...


class Graphs(Protocol):
    """Computes some steps by other means; see graphs.py."""

    @property
    def num_replayed(self) -> int: ...

    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor | None:
        """What `Stage.forward` gives, or None for a step that is not for it."""
        ...


class Runner:
    """Computes steps on one rank.

    cache: None where every step computes whole sequences. graphs: None where nothing is captured; no_graphs: why that
    is so even for those who ask for it, if it is.
    """

    def __init__(
        self,
        model: Stage,
        cache: KVCache | None,
        backend: AttentionBackend,
        world: World,
        device: torch.device,
        graphs: Graphs | None = None,
        no_graphs: str | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.backend = backend
        self.world = world
        self.device = device
        self.graphs, self.no_graphs = graphs, no_graphs
        self._launched: deque[Batch] = deque()  # rank 0: steps whose results are not collected
        self._results: deque[Tensor] = deque()  # where rank 0 is the last stage too

    def launch(self, batch: Batch) -> None:
        """Rank 0: start a step. Returns when this stage's part is done; the other stages go on by themselves."""
        self._launched.append(batch)
        self._tell(_STEP, batch.pack())
        self._compute(batch)

    def collect(self) -> Tensor:
        """Rank 0: the result rows [R, width] of the oldest step launched; waits for them."""
        batch = self._launched.popleft()
        if self._is_last:
            return self._results.popleft()
        rows = torch.empty(_result_shape(batch), dtype=torch.float64)
        return self.world.pp.receive(rows, source=self.world.pp.size - 1, timeout=FOREVER)[: batch.num_results]

    def stop(self) -> None:
        """Rank 0: end the `follow` of all other ranks."""
        self._tell(_STOP, torch.empty(0, dtype=torch.int64))

    def speak(self, words: Tensor) -> None:
        """Rank 0: hand a vector of int64 to the `hear` of all other ranks."""
        self._tell(_WORDS, words)

    def follow(self, hear: Callable[[Tensor], None] = lambda words: None) -> None:
        """The other ranks: take part in every step until rank 0 says stop. `hear` is given what it says beside."""
        while (message := self._hear()) is not None:
            kind, packed = message
            if kind == _STEP:
                self._compute(Batch.unpack(packed))
            else:
                hear(packed)

    @property
    def _is_first(self) -> bool:
        return self.world.topology.is_first_stage

    @property
    def _is_last(self) -> bool:
        return self.world.topology.is_last_stage

    def _tell(self, kind: int, packed: Tensor) -> None:
        header = torch.tensor([kind, len(packed)], dtype=torch.int64)
        for part in (header, packed)[: 1 + (kind != _STOP)]:
            self.world.tp.broadcast(part)
            self._pass_on(part)

    def _hear(self) -> tuple[int, Tensor] | None:
        """The next message, already passed on to the next stage; None to stop. Waits as long as rank 0 idles."""
        kind, length = self._next_part(2).tolist()
        return None if kind == _STOP else (kind, self._next_part(length))

    def _next_part(self, length: int) -> Tensor:
        part = torch.empty(length, dtype=torch.int64)
        if self._is_first:
            self.world.tp.broadcast(part, timeout=FOREVER)
        else:
            self.world.pp.receive(part, source=self.world.pp.rank - 1, timeout=FOREVER)
        self._pass_on(part)
        return part

    def _pass_on(self, tensor: Tensor) -> None:
        if not self._is_last:
            self.world.pp.send(tensor, destination=self.world.pp.rank + 1)

    @torch.inference_mode()
    def _compute(self, batch: Batch) -> None:
        if self.cache is not None:
            self.cache.copy(batch.copies)
        hidden = self._forward(batch, None if self._is_first else self._receive_hidden(batch.num_tokens))
        if self._is_last:
            self._finish(hidden, batch)
        else:
            self._pass_on(hidden)

    def _forward(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """This stage's hidden states from those of the stage before, or from the batch's tokens."""
        if self.graphs is not None and (found := self.graphs.forward(batch, hidden)) is not None:
            return found
        context = self.backend.prepare(batch, self.cache)
        return self.model.forward(batch.tokens.to(self.device) if hidden is None else hidden, context)

    def _receive_hidden(self, num_tokens: int) -> Tensor:
        hidden = torch.empty(num_tokens, self.model.hidden_size, dtype=self.model.dtype, device=self.device)
        return self.world.pp.receive(hidden, source=self.world.pp.rank - 1, timeout=FOREVER)

    def _finish(self, hidden: Tensor, batch: Batch) -> None:
        """The last stage: logits on all tensor ranks, tokens on the first of them, back to rank 0."""
        rows = torch.full(_result_shape(batch), float(NO_TOKEN), dtype=torch.float64)
        done = 0
        for part, outcome in _row_parts(batch):
            logits = self.model.logits(hidden[part.at.to(hidden.device)])
            if self.world.tp.rank == 0:
                found = outcome(logits.to(sampling_device(logits.device)), part)
                rows[done : done + len(found), : found.shape[1]] = found
                done += len(found)
        if self.world.tp.rank:
            return
        if self._is_first:
            self._results.append(rows[: batch.num_results])
        else:
            self.world.pp.send(rows, destination=0)


def _row_parts(batch: Batch) -> Iterator[tuple[Any, Callable[[Tensor, Any], Tensor]]]:
    """The rows whose logits are computed together, with what makes results of them. Of the scored rows, which may be
    as many as the step has tokens, only some at a time."""
    if len(batch.samples):
        yield batch.samples, sample
    for part in batch.scored.split(_MOST_SCORED):
        yield part, score


def _result_shape(batch: Batch) -> tuple[int, int]:
    """At least one row, so that a step without results is answered too and the pipeline keeps its pace."""
    return max(1, batch.num_results), row_width(batch.most_top)
