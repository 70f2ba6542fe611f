"""Where a process stands among the ranks, and where ranks meet, as the launcher's environment variables say."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

PARENT_PIPE = "MINDGEN_PARENT_PIPE"  # number of the inherited descriptor that ends when rank 0 does
JOB = "MINDGEN_JOB"  # a word that only the ranks of one job know
COLLECTIVES = "MINDGEN_COLLECTIVES"  # how CPU ranks of one host talk


@dataclass(frozen=True)
class Place:
    """Where this process stands: among all ranks, and among those of its host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


@dataclass(frozen=True)
class Meeting:
    """Where ranks find each other: a TCP store at host:port, in which this job's keys start with `job`."""

    host: str
    port: int
    job: str
    one_host: bool  # all ranks are on this host, so that loopback is enough
    own_ranks: bool = False  # rank 0 started the others and looks after them
    launcher_store: bool = False  # torchrun runs the store; otherwise rank 0 does
    listener: socket.socket | None = None  # already listening, for the store to take over


def under_launcher(environ: Mapping[str, str]) -> bool:
    """Whether something (torchrun, a scheduler, our own rank 0) has made this process a rank."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def read_place(environ: Mapping[str, str]) -> Place:
    """The place that the launcher's variables give; alone without them. Raises ValueError for impossible values."""
    if not under_launcher(environ):
        return Place()
    world_size = _number(environ, "WORLD_SIZE", 1)
    rank = _number(environ, "RANK", 0, world_size - 1)
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", 1, world_size, default=world_size)
    local_rank = _number(environ, "LOCAL_RANK", 0, local_world_size - 1, default=rank % local_world_size)
    return Place(rank, world_size, local_rank, local_world_size)


def read_meeting(environ: Mapping[str, str]) -> Meeting:
    """Where the launcher's variables say that ranks meet. Raises ValueError for missing or impossible ones."""
    if not environ.get("MASTER_ADDR"):
        raise ValueError("RANK and WORLD_SIZE are set but MASTER_ADDR is not; set it to the host name of rank 0")
    words = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", JOB)
    return Meeting(
        host=environ["MASTER_ADDR"],
        port=_number(environ, "MASTER_PORT", 1, 65535),
        job="/".join(["mindgen", *(environ[word] for word in words if word in environ)]),
        one_host=environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"],
        own_ranks=PARENT_PIPE in environ,
        launcher_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def read_collectives(environ: Mapping[str, str]) -> str:
    """ "auto" for shared memory where ranks can share it, "gloo" for gloo everywhere. Raises ValueError for others."""
    kind = environ.get(COLLECTIVES, "auto")
    if kind not in ("auto", "gloo"):
        raise ValueError(f"the environment variable {COLLECTIVES} is {kind!r}; it must be auto or gloo")
    return kind


def _number(
    environ: Mapping[str, str], name: str, lowest: int, highest: int | None = None, default: int | None = None
) -> int:
    allowed = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    text = environ.get(name, None if default is None else str(default))
    if text is None:
        raise ValueError(f"the environment variable {name} is missing; it must be a whole number {allowed}")
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest or (highest is not None and value > highest):
        raise ValueError(f"the environment variable {name} is {text!r}; it must be a whole number {allowed}")
    return value
