"""Converts in this process and measures how much anonymous memory that takes, beyond what the imports took.

Run as a program with the converter's flags. Prints one JSON object: `code`, `peak` and `seconds`, memory in bytes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from mindgen.commands.convert import main


def anonymous_memory() -> int:
    """RssAnon of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most memory seen while it watches, every two milliseconds."""

    def __init__(self) -> None:
        self.value = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.value = max(self.value, anonymous_memory())


if __name__ == "__main__":
    before, start = anonymous_memory(), time.monotonic()
    with Peak() as peak:
        code = main(sys.argv[1:])
    print(json.dumps({"code": code, "peak": peak.value - before, "seconds": time.monotonic() - start}))
