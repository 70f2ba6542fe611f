"""What ranks say to each other: sums, gathers, broadcasts and point-to-point sends.

Ranks named here (`rank`, `source`, `destination`) count *within the group*. Tensors that are written in place must be
contiguous. Every call takes a `timeout` in seconds: None is the group's own deadline, `FOREVER` is for a rank that has
nothing to do until another one speaks (the watchdog looks after peers meanwhile).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

FOREVER = math.inf
STEP_TIMEOUT = 60.0
LONGEST_WAIT = timedelta(days=30)  # torch wants a number; this one stands for FOREVER
MOST_SENDS, MOST_BYTES = 32, 64 << 20  # under way from one group at a time, before a send waits for the oldest
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8)


class PeerLost(RuntimeError):
    """A rank that takes part in a collective died, left or did not answer in time."""


class Group(Protocol):
    """Some ranks that talk to each other. Everybody in it makes the same collective calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        """Sum over the group, in place; the same bits on every rank. Returns `tensor`."""

    def all_gather(self, tensor: Tensor, dim: int, timeout: float | None = None) -> Tensor:
        """The ranks' tensors (all of one shape) concatenated along `dim` in rank order."""

    def broadcast(self, tensor: Tensor, source: int = 0, timeout: float | None = None) -> Tensor:
        """The source's values, in place. Returns `tensor`."""

    def send(self, tensor: Tensor, destination: int) -> None:
        """Starts a send and returns at once, unless the receiver lags dozens of sends behind.

        `tensor` is kept alive here, and must not be modified afterwards.
        """

    def receive(self, tensor: Tensor, source: int, timeout: float | None = None) -> Tensor:
        """Waits for the source's next send, whose shape and dtype must be those of `tensor`; in place."""

    def barrier(self, timeout: float | None = None) -> None: ...

    def close(self) -> None:
        """Waits for sends under way. The group is not used afterwards."""


class SingleGroup:
    """The group of one: everything is already where it belongs."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, dim: int, timeout: float | None = None) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0, timeout: float | None = None) -> Tensor:
        assert source == 0, f"source {source} in a group of one"
        return tensor

    def send(self, tensor: Tensor, destination: int) -> None:
        raise AssertionError("a group of one has nobody to send to")

    def receive(self, tensor: Tensor, source: int, timeout: float | None = None) -> Tensor:
        raise AssertionError("a group of one has nobody to receive from")

    def barrier(self, timeout: float | None = None) -> None:
        pass

    def close(self) -> None:
        pass


def raise_lost(message: str) -> NoReturn:
    raise PeerLost(message)


class DistributedGroup:
    """A group over torch.distributed: gloo for CPU tensors, the device's own library for its tensors.

    `ranks` are world ranks in group order; this process is one of them. `on_loss` is called with a sentence when a
    peer cannot be reached; it may wait for the watchdog to name the rank, and it raises.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        cpu: dist.ProcessGroup,
        device: dist.ProcessGroup | None = None,
        timeout: float = STEP_TIMEOUT,
        on_loss: Callable[[str], NoReturn] = raise_lost,
    ) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.size = len(self.ranks)
        self.timeout = timeout
        self._cpu, self._device = cpu, device
        self._on_loss = on_loss
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        self._check(tensor)
        with self._talk("all_reduce"):
            self._wait(dist.all_reduce(tensor, group=self._group(tensor), async_op=True), tensor, timeout)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int, timeout: float | None = None) -> Tensor:
        tensor = tensor.contiguous()
        self._check(tensor)
        parts = list(tensor.new_empty((self.size, *tensor.shape)).unbind(0))
        with self._talk("all_gather"):
            self._wait(dist.all_gather(parts, tensor, group=self._group(tensor), async_op=True), tensor, timeout)
        return torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, source: int = 0, timeout: float | None = None) -> Tensor:
        self._check(tensor)
        group = self._group(tensor)
        with self._talk("broadcast"):
            self._wait(dist.broadcast(tensor, self.ranks[source], group=group, async_op=True), tensor, timeout)
        return tensor

    def send(self, tensor: Tensor, destination: int) -> None:
        tensor = tensor.contiguous()
        self._check(tensor)
        with self._talk("send"):
            work = dist.isend(tensor, self.ranks[destination], group=self._group(tensor))
            assert work is not None, "send is called by a member of the group"
            self._sending.append((work, tensor))
            self._prune()

    def receive(self, tensor: Tensor, source: int, timeout: float | None = None) -> Tensor:
        self._check(tensor)
        with self._talk("receive"):
            work = dist.irecv(tensor, self.ranks[source], group=self._group(tensor))
            assert work is not None, "receive is called by a member of the group"
            self._wait(work, tensor, timeout)
        return tensor

    def barrier(self, timeout: float | None = None) -> None:
        self.all_reduce(torch.zeros(1), timeout)

    def close(self) -> None:
        with self._talk("send"):
            while self._sending:
                self._finish_oldest_send(self.timeout)

    def _prune(self) -> None:
        """Forgets sends that have arrived. gloo tells only those who wait, so there the oldest is waited for once
        much is under way: by then it has arrived, unless the receiver lags that far behind."""
        while len(self._sending) > 1 and (self._sending[0][0].is_completed() or self._is_much()):
            self._finish_oldest_send(FOREVER)

    def _is_much(self) -> bool:
        return len(self._sending) > MOST_SENDS or sum(tensor.nbytes for _, tensor in self._sending) > MOST_BYTES

    def _finish_oldest_send(self, timeout: float) -> None:
        work, tensor = self._sending.popleft()
        self._wait(work, tensor, timeout)

    def _group(self, tensor: Tensor) -> dist.ProcessGroup:
        if tensor.device.type == "cpu":
            return self._cpu
        assert self._device is not None, f"this group has no {tensor.device.type} side"
        return self._device

    def _check(self, tensor: Tensor) -> None:
        assert tensor.dtype in DTYPES, f"{tensor.dtype} tensors do not travel between ranks"
        assert tensor.is_contiguous(), "a tensor that is written in place must be contiguous"

    def _wait(self, work: dist.Work, tensor: Tensor, timeout: float | None) -> None:
        """On a device the deadline is the process group's own: a timed wait there would block the host and poll."""
        if tensor.device.type != "cpu":
            work.wait()
            return
        seconds = self.timeout if timeout is None else timeout
        work.wait(LONGEST_WAIT if seconds == FOREVER else timedelta(seconds=seconds))

    @contextmanager
    def _talk(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._on_loss(f"{what} among ranks {', '.join(map(str, self.ranks))} failed: {reason}")
