"""How ranks find each other: one store, and a roll call in it before anything else is said."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from mindgen.parallel.place import Meeting, Place
from mindgen.parallel.process import Process

ROLL_CALL_TIMEOUT = 60.0


class RendezvousError(RuntimeError):
    """The ranks did not all find each other."""


def open_store(meeting: Meeting, rank: int, timeout: float = ROLL_CALL_TIMEOUT) -> dist.Store:
    """This process's connection to the job's keys; rank 0 starts the store first, unless its launcher runs one.

    Raises RendezvousError when the port is taken, the host is unknown, or nobody answers within `timeout` seconds.
    """
    _resolve(meeting)
    waiting = timedelta(seconds=timeout)
    try:
        if rank == 0 and not meeting.launcher_store:
            descriptor = (meeting.listener or _listen(meeting)).detach()
            # only the plain backend takes over a listening socket in every torch that is supported
            server = dist.TCPStore(
                meeting.host, meeting.port, None, True, waiting, False, master_listen_fd=descriptor, use_libuv=False
            )
            return dist.PrefixStore(meeting.job, server)
        return open_client(meeting, timeout)
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {rank} reached nobody at {meeting.host}:{meeting.port} within {timeout:g} s; check MASTER_ADDR and"
            " MASTER_PORT, that rank 0 has started, and the firewall between the hosts"
        ) from error


def open_client(meeting: Meeting, timeout: float = ROLL_CALL_TIMEOUT) -> dist.Store:
    """One more connection to the job's keys. A connection serves one caller at a time, and some wait long."""
    client = dist.TCPStore(meeting.host, meeting.port, None, False, timedelta(seconds=timeout), False)
    return dist.PrefixStore(meeting.job, client)


def _resolve(meeting: Meeting) -> None:
    try:
        socket.getaddrinfo(meeting.host, meeting.port)
    except OSError as error:
        raise RendezvousError(f"MASTER_ADDR {meeting.host!r} is not a host that can be found here: {error}") from error


def _listen(meeting: Meeting) -> socket.socket:
    """Listens on MASTER_ADDR alone where that is an address of this host, else (a service name, NAT) on all."""
    family, _, _, _, address = socket.getaddrinfo(meeting.host, meeting.port, type=socket.SOCK_STREAM)[0]
    try:
        try:
            return socket.create_server(address[:2], family=family, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return socket.create_server(("", meeting.port), backlog=4096)
    except OSError as error:
        raise RendezvousError(
            f"rank 0 cannot listen on {meeting.host}:{meeting.port} ({error.strerror}); choose another MASTER_PORT"
        ) from error


def roll_call(
    store: dist.Store, place: Place, timeout: float, loss: Callable[[], str | None] = lambda: None
) -> tuple[str, tuple[Process, ...]]:
    """Waits until every rank is there. Returns the prefix of this connection's keys, and the ranks' processes.

    A job may connect several times in turn; each time has keys of its own. Raises RendezvousError naming the ranks
    that are missing after `timeout` seconds, a rank number that two processes claim, or a `loss` that makes waiting
    useless.
    """
    count = store.add(f"arrivals/{place.rank}", 1)
    mine = str(Process.mine())
    if count > 1 and store.get(f"{count - 1}/process/{place.rank}").decode() != mine:
        raise RendezvousError(f"another process is already rank {place.rank} of this job; is RANK set twice?")
    keys = dist.PrefixStore(str(count), store)
    keys.set(pulse_key(place.rank), "")  # before the rank counts as present, for others read it from then on
    keys.set(f"process/{place.rank}", mine)
    names = [f"process/{rank}" for rank in range(place.world_size)]
    _await(keys, names, timeout, loss)
    return str(count), tuple(Process.parse(keys.get(name).decode()) for name in names)


def pulse_key(rank: int) -> str:
    """Where a rank says that it lives; `watchdog` writes and reads it."""
    return f"pulse/{rank}"


def _await(keys: dist.Store, names: Sequence[str], timeout: float, loss: Callable[[], str | None]) -> None:
    """Asks again and again rather than waiting inside the store, so that Ctrl-C is heard."""
    deadline = time.monotonic() + timeout
    while (reason := loss()) is not None or not keys.check(list(names)):
        if reason is not None:
            raise RendezvousError(reason)
        if time.monotonic() > deadline:
            missing = [rank for rank, name in enumerate(names) if not keys.check([name])]
            raise RendezvousError(
                f"{len(missing)} of {len(names)} ranks did not start within {timeout:g} s:"
                f" rank {', '.join(map(str, missing))}"
            )
        time.sleep(0.02)
