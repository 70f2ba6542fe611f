"""How the tools end: one line that says what went wrong, and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


class _Stopped(BaseException):
    """A signal asked the process to end."""


def run(name: str, work: Callable[[], None]) -> int:
    """Runs `work`; 0, or 2 with a message for what a user can mend, or 128 + n when signal n stopped it cleanly."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        work()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
    except OSError as error:
        return _refuse(name, f"{error.filename or 'a file'}: {error.strerror}")
    except ValueError as error:
        return _refuse(name, str(error))
    except BaseException:
        if not received:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else 0


def _refuse(name: str, message: str) -> int:
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2
