"""Whether files are read past the system's cache: that saves the memory and the time of a second copy, but the next
load reads from the disk again. A disk that is quick beside the rest of a load makes no difference there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from threading import Lock

from mindgen.weights.mapped import Stretch

SAMPLE = 128 << 20  # bytes by which a disk is judged, or less of a slow one: as many as would come in that time


class Pace:
    """Watches the first requests to the disk, of several threads at once.

    least_rate: bytes a second of a request, while the other threads' are under way, that are worth reading past the
    cache; 0: always, infinity: never.
    clock: seconds, from anywhere.
    """

    def __init__(self, least_rate: float, clock: Callable[[], float] = time.monotonic):
        self.past_cache = least_rate < inf
        self._settled = not 0 < least_rate < inf
        self._least_rate, self._clock, self._lock = least_rate, clock, Lock()
        self._seconds = 0.0  # of all requests: what a thread does in between says nothing of the disk
        self._read: list[Stretch] = []

    @contextmanager
    def request(self, stretch: Stretch) -> Iterator[list[Stretch]]:
        """Within it, a stretch is read past the cache. Afterwards the list has what shall follow into the cache: once
        a disk is found slow, all that was read past it."""
        to_follow: list[Stretch] = []
        start = self._clock()
        yield to_follow
        seconds = self._clock() - start
        with self._lock:
            to_follow += self._judge(stretch, seconds)

    def give_up(self) -> None:
        """The rest goes through the cache, as this system or file system knows nothing else."""
        with self._lock:
            self.past_cache, self._settled = False, True

    def _judge(self, stretch: Stretch, seconds: float) -> list[Stretch]:
        if self._settled:
            return [] if self.past_cache else [stretch]
        self._read.append(stretch)
        self._seconds += seconds
        num_bytes = sum(read.length for read in self._read)
        self.past_cache = self._seconds * self._least_rate <= max(SAMPLE, num_bytes)
        self._settled = num_bytes >= SAMPLE or not self.past_cache
        read, self._read = self._read, [] if self._settled else self._read
        return [] if self.past_cache else read
