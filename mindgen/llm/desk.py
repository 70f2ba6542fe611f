"""Who waits for which request. Threads of the user's on one side of the desk, the thread of the engine on the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from mindgen.engine.request import Output

Deliver = Callable[[list[Output] | Exception], None]


class Desk:
    """Numbers requests and hands each output to the one who waits for it; an exception, to everybody concerned.

    `deliver` is called by the engine's thread and must return at once. Any thread may call any method, and a garbage
    collection in the middle of one another one: hence a lock that the same thread may take twice.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._next = 0
        self._waiting: dict[int, Deliver] = {}
        self._early: dict[int, list[list[Output] | Exception]] = {}  # on ranks that ask later than rank 0
        self._failure: Exception | None = None

    def open(self, count: int, deliver: Deliver) -> range:
        """The numbers of `count` new requests, whose outputs `deliver` will get.

        Raises the reason if all is over, but for a rank that asks so late that it has been answered before.
        """
        with self._lock:
            numbers = range(self._next, self._next + count)
            early = [news for number in numbers for news in self._early.pop(number, ())]
            if not early:
                self.check()
            self._next = numbers.stop
            self._waiting |= dict.fromkeys(numbers, deliver)
            for news in early:
                deliver(news)
            if self._failure is not None:
                self.refuse(numbers, self._failure)
            return numbers

    def check(self) -> None:
        """Raises what ended this engine, if it has ended."""
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def leave(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these any longer."""
        with self._lock:
            for number in numbers:
                self._waiting.pop(number, None)

    def post(self, outputs: Iterable[Output]) -> None:
        """Hands out what is new, in one piece to each who waits."""
        with self._lock:
            parcels: dict[Deliver, list[Output]] = {}
            for output in outputs:
                deliver = self._waiting.get(output.request_id)
                if deliver is not None:
                    parcels.setdefault(deliver, []).append(output)
                else:
                    self._keep(output.request_id, [output])
            for deliver, parcel in parcels.items():
                deliver(parcel)

    def refuse(self, numbers: Iterable[int], error: Exception) -> None:
        """Tells those who wait for these that nothing will come."""
        with self._lock:
            found: dict[Deliver, None] = {}
            for number in numbers:
                deliver = self._waiting.pop(number, None)
                if deliver is None:
                    self._keep(number, error)
                else:
                    found[deliver] = None
            for deliver in found:
                deliver(error)

    def fail(self, error: Exception) -> None:
        """Tells all who wait, and all who come later. The first reason stays."""
        with self._lock:
            self._failure = self._failure or error
            self.refuse(list(self._waiting), error)

    def _keep(self, number: int, news: list[Output] | Exception) -> None:
        """For who will ask; whom nobody waits for any longer is forgotten."""
        if number >= self._next:
            self._early.setdefault(number, []).append(news)
