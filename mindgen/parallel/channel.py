"""One way from one rank to another, through shared memory: a ring of slots. Large tensors travel in pieces."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from mindgen.parallel.arena import LINE, Arena, Stretch
from mindgen.parallel.group import FOREVER, MOST_BYTES, MOST_SENDS
from mindgen.parallel.waiting import Patience

SLOTS, SLOT_BYTES = 32, 128 << 10
POSTED, TAKEN, SIZES = 0, LINE, 2 * LINE  # words: slots filled, slots emptied, the message's bytes for every slot
HEADER = 4096
CHANNEL_BYTES = HEADER + SLOTS * SLOT_BYTES


@dataclass
class Message:
    """A tensor under way; kept alive until all of it is in the ring."""

    tensor: Tensor
    done: int = 0  # bytes
    started: bool = False

    @property
    def is_finished(self) -> bool:
        return self.started and self.done == self.tensor.nbytes


class Outbox:
    """The sender's end. What does not fit into the ring waits here, and a thread passes it on."""

    def __init__(self, arena: Arena, offset: int, peer: int, patience: Patience) -> None:
        self._stretch = arena.map(offset, CHANNEL_BYTES)
        self._peer, self._patience = peer, patience
        self._posted = 0
        self._pending: deque[Message] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def send(self, tensor: Tensor) -> None:
        """`tensor` is contiguous. Waits only while too much is pending."""
        with self._lock:
            self._pending.append(Message(tensor))
            self._advance()
            if self._pending and self._thread is None:
                self._thread = threading.Thread(target=self._pass_on, name="sending", daemon=True)
                self._thread.start()
        while self._is_much():
            self._wait_and_advance(FOREVER)

    def finish(self, timeout: float) -> None:
        """Waits until everything is in the ring, where the receiver finds it even when this process has ended."""
        while self._pending:
            self._wait_and_advance(timeout)

    def _wait_and_advance(self, timeout: float) -> None:
        self._patience.wait(self._stretch, TAKEN, self._posted - SLOTS + 1, self._peer, timeout)
        with self._lock:
            self._advance()

    def _advance(self) -> None:
        """Fills free slots. The caller holds the lock."""
        while self._pending and self._posted - self._stretch.words[TAKEN] < SLOTS:
            self._post_piece(self._pending[0])
            if self._pending[0].is_finished:
                self._pending.popleft()

    def _post_piece(self, message: Message) -> None:
        slot, total = self._posted % SLOTS, message.tensor.nbytes
        length = min(SLOT_BYTES, total - message.done)
        source = message.tensor.data_ptr() + message.done
        ctypes.memmove(self._stretch.address + HEADER + slot * SLOT_BYTES, source, length)
        self._stretch.words[SIZES + slot] = total
        message.done, message.started = message.done + length, True
        self._posted += 1
        self._stretch.words[POSTED] = self._posted
        self._stretch.wake(POSTED)

    def _is_much(self) -> bool:
        with self._lock:
            return len(self._pending) > MOST_SENDS or sum(each.tensor.nbytes for each in self._pending) > MOST_BYTES

    def _pass_on(self) -> None:
        """Ends when nothing is pending, or nobody is there to take it."""
        while self._patience.lost(self._peer) is None:
            taken = self._stretch.words[TAKEN]
            with self._lock:
                self._advance()
                if not self._pending:
                    self._thread = None
                    return
            self._stretch.sleep(TAKEN, taken)


class Inbox:
    """The receiver's end."""

    def __init__(self, arena: Arena, offset: int, peer: int, patience: Patience) -> None:
        self._stretch: Stretch = arena.map(offset, CHANNEL_BYTES)
        self._peer, self._patience = peer, patience
        self._taken = 0

    def receive(self, tensor: Tensor, timeout: float) -> None:
        """Fills `tensor`, which is contiguous. Raises Silence as `Patience.wait` does."""
        self._take_piece(tensor, 0, timeout)
        for start in range(SLOT_BYTES, tensor.nbytes, SLOT_BYTES):
            self._take_piece(tensor, start, timeout)

    def _take_piece(self, tensor: Tensor, start: int, timeout: float) -> None:
        self._patience.wait(self._stretch, POSTED, self._taken + 1, self._peer, timeout)
        slot, total = self._taken % SLOTS, tensor.nbytes
        sent = self._stretch.words[SIZES + slot]
        assert sent == total, f"rank {self._peer} sent {sent} bytes where {total} are expected"
        source = self._stretch.address + HEADER + slot * SLOT_BYTES
        ctypes.memmove(tensor.data_ptr() + start, source, min(SLOT_BYTES, total - start))
        self._taken += 1
        self._stretch.words[TAKEN] = self._taken
        self._stretch.wake(TAKEN)
