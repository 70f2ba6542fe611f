"""Refuses requests that could never be served, before any of them is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mindgen.commands.flags import by_flags
from mindgen.engine.engine import Engine
from mindgen.engine.request import Request


def check_served(engine: Engine, requests: Iterable[tuple[str, Request]], flags: Mapping[str, str]) -> None:
    """Asks for each request and takes it back, because the engine knows what it can ever serve.

    requests: each with what it is called. flags: what options are called on the command line.
    Raises ValueError for the first that cannot be served.
    """
    for name, request in requests:
        submit(engine, name, request, flags)
        engine.abort(request.id)
    engine.step()  # tells of those taken back, to nobody


def submit(engine: Engine, name: str, request: Request, flags: Mapping[str, str]) -> None:
    """Asks for one. What is refused is said with its name and the flags, in a ValueError."""
    try:
        with by_flags(flags):
            engine.submit(request)
    except ValueError as error:
        raise ValueError(request.named(str(error), name)) from None
