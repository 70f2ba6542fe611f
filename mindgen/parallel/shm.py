"""A group of CPU ranks of one host that talk through shared memory: the quick twin of gloo's group.

Every rank has two slots, used in turn, and a counter. In a round a rank writes its slot, counts up, waits for the
others' counters and reads their slots. Who has counted the next round has read the last one, so a slot may be written
again two rounds later. That data is visible before the counter that announces it is a promise of x86 processors;
`arena` asks for them. Tensors larger than a slot take several rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from mindgen.parallel.arena import LINE, Arena
from mindgen.parallel.channel import CHANNEL_BYTES, Inbox, Outbox
from mindgen.parallel.group import DTYPES, STEP_TIMEOUT, raise_lost
from mindgen.parallel.process import Process
from mindgen.parallel.waiting import Patience, Silence

SLOT_BYTES = 512 << 10
SHARED_WORK = 256 << 10  # bytes from which more than two ranks sum a portion each, not everything
MOST_VIEWS = 256
LOW_PRECISION = (torch.bfloat16, torch.float16)
CLOSED = 1  # word behind a rank's counter: it will not count again

Slots = list[Tensor]  # one rank's each, in rank order


class SharedGroup:
    """`ranks` are world ranks in group order, `rank` is this one's world rank, `processes` are all ranks' processes.

    Sums are of neighbours first; those of 16-bit floats in fp32, rounded once. Every rank of the host makes all groups
    of the host in the same order, also those that it is not in, by `reserve`. `on_loss` is as in DistributedGroup.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        arena: Arena,
        processes: Sequence[Process],
        crowded: bool = False,
        timeout: float = STEP_TIMEOUT,
        on_loss: Callable[[str], NoReturn] = raise_lost,
    ) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(rank)
        self.size = len(self.ranks)
        self.timeout = timeout
        self._arena, self._processes, self._on_loss = arena, processes, on_loss
        self._offset = self.reserve(arena, self.size)
        self._stretch = arena.map(self._offset, _collective_bytes(self.size))
        self._words = self._stretch.words
        self._patience = Patience(crowded, self._explain_loss)
        self._others = [other for other in range(self.size) if other != self.rank]
        self._count = 0  # of this rank, as in its word
        self._started = 0  # the count with which this round began
        self._met = 0  # a count that all ranks are known to have reached
        self._turn = 0  # which of the two slots this round uses
        self._views: dict[tuple[torch.dtype, torch.Size], tuple[Slots, Slots]] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}

    @staticmethod
    def reserve(arena: Arena, size: int) -> int:
        """Takes the memory of a group of `size` ranks."""
        return arena.take(_collective_bytes(size) + size * size * CHANNEL_BYTES)

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        _check(tensor)
        try:
            for piece in _pieces(tensor):
                slots = self._exchange(piece, timeout)
                if self.size > 2 and piece.nbytes >= SHARED_WORK:
                    self._sum_together(slots, piece, timeout)
                else:
                    _sum(slots, piece)
        except Silence as silence:
            self._lose("all_reduce", silence)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int, timeout: float | None = None) -> Tensor:
        tensor = tensor.contiguous()
        _check(tensor)
        try:
            if 0 < tensor.nbytes <= SLOT_BYTES:
                return torch.cat(self._exchange(tensor, timeout), dim)
            parts = tensor.new_empty((self.size, *tensor.shape)).unbind(0)
            for piece, *targets in zip(_pieces(tensor), *map(_pieces, parts), strict=True):
                for target, slot in zip(targets, self._exchange(piece, timeout), strict=True):
                    target.copy_(slot)
        except Silence as silence:
            self._lose("all_gather", silence)
        return torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, source: int = 0, timeout: float | None = None) -> Tensor:
        _check(tensor)
        try:
            for piece in _pieces(tensor):
                if source == self.rank:
                    self._write(piece, timeout)
                else:
                    self._begin()
                    self._post()
                    self._wait(source, self._count, timeout)
                    piece.copy_(self._slots(piece)[source])
        except Silence as silence:
            self._lose("broadcast", silence)
        return tensor

    def send(self, tensor: Tensor, destination: int) -> None:
        tensor = tensor.contiguous()
        _check(tensor)
        try:
            self._outbox(destination).send(tensor)
        except Silence as silence:
            self._lose("send", silence)

    def receive(self, tensor: Tensor, source: int, timeout: float | None = None) -> Tensor:
        _check(tensor)
        try:
            self._inbox(source).receive(tensor, self.timeout if timeout is None else timeout)
        except Silence as silence:
            self._lose("receive", silence)
        return tensor

    def barrier(self, timeout: float | None = None) -> None:
        try:
            self._begin()
            self._post()
            self._meet(self._count, timeout)
        except Silence as silence:
            self._lose("barrier", silence)

    def close(self) -> None:
        try:
            for outbox in self._outboxes.values():
                outbox.finish(self.timeout)
        except Silence as silence:
            self._lose("send", silence)
        self._words[LINE * self.rank + CLOSED] = 1

    def _exchange(self, piece: Tensor, timeout: float | None) -> Slots:
        """Everybody's piece. The slots are good until the round after the next one."""
        slots = self._write(piece, timeout)
        self._meet(self._count, timeout)
        return slots

    def _sum_together(self, slots: Slots, piece: Tensor, timeout: float | None) -> None:
        """Every rank sums one portion, puts it into its own slot, and takes the other portions from theirs."""
        portions = [slot.view(-1).tensor_split(self.size) for slot in slots]
        totals = piece.view(-1).tensor_split(self.size)
        _sum([portion[self.rank] for portion in portions], totals[self.rank])
        portions[self.rank][self.rank].copy_(totals[self.rank])
        self._post()
        for other in self._others:
            self._wait(other, self._count, timeout)
            totals[other].copy_(portions[other][other])
        self._met = self._count

    def _write(self, piece: Tensor, timeout: float | None) -> Slots:
        """Begins a round with `piece` in this rank's slot, once everybody has read what was there."""
        if self._met < self._started:
            self._meet(self._started, timeout)
        self._begin()
        slots = self._slots(piece)
        slots[self.rank].copy_(piece)
        self._post()
        return slots

    def _begin(self) -> None:
        self._started = self._count + 1
        self._turn ^= 1

    def _post(self) -> None:
        self._count += 1
        self._words[LINE * self.rank] = self._count
        self._stretch.wake(LINE * self.rank)

    def _meet(self, count: int, timeout: float | None) -> None:
        for other in self._others:
            self._wait(other, count, timeout)
        self._met = count

    def _wait(self, other: int, count: int, timeout: float | None) -> None:
        seconds = self.timeout if timeout is None else timeout
        self._patience.wait(self._stretch, LINE * other, count, other, seconds)

    def _slots(self, piece: Tensor) -> Slots:
        """The slots of this turn, seen as tensors like `piece`."""
        key = (piece.dtype, piece.shape)
        if key not in self._views:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            self._views[key] = (self._view_slots(piece, 0), self._view_slots(piece, 1))
        return self._views[key][self._turn]

    @torch.inference_mode(False)  # views made in inference mode could not be written outside it
    def _view_slots(self, piece: Tensor, turn: int) -> Slots:
        first = LINE * 8 * self.size
        offsets = [first + (turn * self.size + rank) * SLOT_BYTES for rank in range(self.size)]
        memory = self._stretch.memory
        flat = [torch.frombuffer(memory, dtype=piece.dtype, count=piece.numel(), offset=start) for start in offsets]
        return [each.view(piece.shape) for each in flat]

    def _outbox(self, destination: int) -> Outbox:
        if destination not in self._outboxes:
            offset = self._channel(self.rank, destination)
            self._outboxes[destination] = Outbox(self._arena, offset, destination, self._patience)
        return self._outboxes[destination]

    def _inbox(self, source: int) -> Inbox:
        if source not in self._inboxes:
            self._inboxes[source] = Inbox(self._arena, self._channel(source, self.rank), source, self._patience)
        return self._inboxes[source]

    def _channel(self, source: int, destination: int) -> int:
        number = source * self.size + destination
        return self._offset + _collective_bytes(self.size) + number * CHANNEL_BYTES

    def _explain_loss(self, rank: int) -> str | None:
        if self._words[LINE * rank + CLOSED]:
            return f"rank {self.ranks[rank]} has left"
        return None if self._processes[self.ranks[rank]].is_alive else f"rank {self.ranks[rank]} has ended"

    def _lose(self, what: str, silence: Silence) -> NoReturn:
        self._on_loss(f"{what} among ranks {', '.join(map(str, self.ranks))} failed: {silence}")


def _collective_bytes(size: int) -> int:
    """Counters, and two slots of every rank; whole pages."""
    return -(-(LINE * 8 * size + 2 * size * SLOT_BYTES) // 4096) * 4096


def _check(tensor: Tensor) -> None:
    assert tensor.dtype in DTYPES, f"{tensor.dtype} tensors do not travel between ranks"
    assert tensor.is_contiguous(), "a tensor that is written in place must be contiguous"


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views that fit into a slot."""
    size = tensor.nbytes
    if size > SLOT_BYTES:
        return tensor.view(-1).split(SLOT_BYTES // tensor.itemsize)
    return (tensor,) if size else ()


def _sum(slots: Slots, total: Tensor) -> None:
    if len(slots) > 2 and total.dtype in LOW_PRECISION:
        exact = slots[0].float()
        for slot in slots[1:]:
            exact.add_(slot)
        total.copy_(exact)
        return
    while len(slots) > 2:  # neighbours first, as one rank sums its parts
        odd = slots[len(slots) // 2 * 2 :]
        slots = [left + right for left, right in zip(slots[::2], slots[1::2], strict=False)] + odd
    torch.add(slots[0], slots[1], out=total)
