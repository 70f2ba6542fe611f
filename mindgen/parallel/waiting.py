"""How a rank waits for a word in shared memory to reach a number, and how it learns that it never will."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mindgen.parallel.arena import Stretch

POLLS = 200  # about 10 us
SPINNING = 0.002  # seconds in which a waiting rank keeps its core, where there is one for every rank
CROWDED_YIELDS = 4  # where ranks share cores: to whoever computes there
LOOK_AROUND = 0.2  # seconds between looks whether a peer still lives
LONGEST_NAP = 0.1  # seconds; after a longer one this rank was stopped, and its peers maybe with it: that is no silence


class Silence(Exception):
    """Why a wait is over without an answer."""


class Patience:
    """`crowded`: ranks of this host outnumber its cores, so that who waits makes room at once.

    `lost(rank)` says why a rank of the group will never answer, None while it may.
    """

    def __init__(self, crowded: bool, lost: Callable[[int], str | None]) -> None:
        self.lost = lost
        self._polls = 1 if crowded else POLLS
        self._crowded = crowded

    def wait(self, stretch: Stretch, index: int, least: int, rank: int, timeout: float) -> None:
        """Until the word at `index`, which `rank` counts up, is `least` or more.

        Raises Silence after `timeout` seconds (`math.inf` for never), or when the rank is lost.
        """
        words = stretch.words
        for _ in range(self._polls):
            if words[index] >= least:
                return
        self._wait_longer(stretch, index, least, rank, timeout)

    def _wait_longer(self, stretch: Stretch, index: int, least: int, rank: int, timeout: float) -> None:
        words, last = stretch.words, time.monotonic()
        if self._yield(stretch, index, least, last):
            return
        waited, looked = 0.0, 0.0
        while (value := words[index]) < least:
            stretch.sleep(index, value)
            now = time.monotonic()
            waited, last = waited + min(now - last, LONGEST_NAP), now
            if waited - looked > LOOK_AROUND:
                self._look(stretch, index, least, rank)
                looked = waited
            if waited > timeout and words[index] < least:
                raise Silence(f"rank {rank} said nothing for {timeout:g} s")

    def _yield(self, stretch: Stretch, index: int, least: int, start: float) -> bool:
        """Waits without sleeping; whether that was enough."""
        words, yields = stretch.words, 0
        while words[index] < least:
            os.sched_yield()
            yields += 1
            if (self._crowded and yields >= CROWDED_YIELDS) or time.monotonic() - start > SPINNING:
                return False
        return True

    def _look(self, stretch: Stretch, index: int, least: int, rank: int) -> None:
        reason = self.lost(rank)
        if reason and stretch.words[index] < least:  # its last words count
            raise Silence(reason)
