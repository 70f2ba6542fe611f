"""All ranks of a run, connected: the groups they talk in, and what they agree on."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

import torch
import torch.distributed as dist

from mindgen.device import backend_name, set_current
from mindgen.parallel.arena import share_memory
from mindgen.parallel.group import FOREVER, LONGEST_WAIT, Group, SingleGroup
from mindgen.parallel.launch import Ranks, join_ranks
from mindgen.parallel.network import Network
from mindgen.parallel.place import Meeting, read_collectives
from mindgen.parallel.rendezvous import ROLL_CALL_TIMEOUT, open_client, open_store, roll_call
from mindgen.parallel.topology import SINGLE, Topology
from mindgen.parallel.watchdog import Watchdog

MESSAGE_BYTES = 4096
DIGEST_BYTES = 256


class RankError(RuntimeError):
    """A rank cannot go on; raised on all ranks alike. `rank` is the first such rank, `message` its reason."""

    def __init__(self, rank: int, message: str, everywhere: bool = False) -> None:
        super().__init__(message if everywhere else f"rank {rank}: {message}")
        self.rank, self.message = rank, message


@dataclass(frozen=True)
class World:
    """This rank's place, and its groups. Leaving its `with` block closes it; an error on the way out is announced.

    The pp group holds the ranks with my tensor rank, in stage order.
    """

    topology: Topology = SINGLE
    tp: Group = field(default_factory=SingleGroup)
    pp: Group = field(default_factory=SingleGroup)
    everyone: Group = field(default_factory=SingleGroup)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    network: Network | None = None  # None in a world of one rank
    is_part: bool = False  # of a larger world, which is the one to close

    @property
    def watchdog(self) -> Watchdog | None:
        return None if self.network is None else self.network.watchdog

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RankError):
            self.close()
        elif self.watchdog is not None and isinstance(error, Exception):
            self.watchdog.fail(f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        elif self.watchdog is not None:
            self.watchdog.leave(timeout=0)  # Ctrl-C or an exit code: nobody's fault

    def close(self) -> None:
        """Ends in good order: sends under way arrive, the others learn that we leave and are waited for a while."""
        for group in (self.tp, self.pp, self.everyone):
            group.close()
        if self.network is not None and not self.is_part:
            self.network.watchdog.leave()
            self.network.close()

    def agree(self, error: str | None) -> None:
        """Every rank says what is wrong with it, None if nothing; raises RankError on all ranks if anything is.

        Waits for the slowest rank, however long it takes. Messages are cut at 4 KiB.
        """
        sizes = self.everyone.all_gather(torch.tensor([-1 if error is None else 1]), 0, FOREVER)
        if int(sizes.max()) < 0:
            return
        messages = self._exchange(error or "", MESSAGE_BYTES)
        first = int((sizes > 0).nonzero()[0])
        raise RankError(first, messages[first], everywhere=bool((sizes > 0).all()) and len(set(messages)) == 1)

    def same(self, what: str, digest: str) -> None:
        """Raises RankError on all ranks unless all of them give the same digest (at most 256 bytes) for `what`."""
        digests = self._exchange(digest, DIGEST_BYTES)
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise RankError(rank, f"{what} differs between ranks: {digests[0]} on rank 0, {other} on rank {rank}")

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For work that may hold Python's interpreter lock for seconds: this rank's silence is forgiven for longer."""
        if self.watchdog is None:
            yield
            return
        with self.watchdog.loading():
            yield

    def part(self, tp: int, pp: int, ep: int = 1) -> World | None:
        """The first tp * pp ranks as a world of their own; None for the others. All ranks call it alike."""
        rank, size = self.everyone.rank, tp * pp
        if size > self.everyone.size:
            raise ValueError(f"tp {tp} x pp {pp} = {size} ranks do not fit into a world of {self.everyone.size}")
        if self.network is None:
            return self
        groups = self.network.groups(tp, pp)
        if rank >= size:
            return None
        return World(Topology(rank, tp, pp, ep), *groups, self.device, self.network, is_part=True)

    def _exchange(self, text: str, size: int) -> list[str]:
        """The ranks' texts, each cut at `size` bytes of UTF-8."""
        data = text.encode(errors="replace")[:size]
        padded = torch.tensor(list(data.ljust(size, b"\0")), dtype=torch.uint8)
        rows = self.everyone.all_gather(padded[None], 0, FOREVER)  # [ranks, size]
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]


def connect(
    topology: Topology, device: torch.device, timeout: float = ROLL_CALL_TIMEOUT, ranks: Ranks | None = None
) -> World:
    """Connects this rank to all others. `ranks` is what `start_ranks` gave; without it, what the launcher's
    environment variables say. One rank alone needs no connection.

    Raises ValueError when the topology is not that of the started ranks, RendezvousError when ranks are missing after
    `timeout` seconds.
    """
    if topology.world_size == 1 and ranks is None:
        return World(topology, device=device)
    ranks = ranks or join_ranks(os.environ)
    place = ranks.place
    if (topology.rank, topology.world_size) != (place.rank, place.world_size):
        raise ValueError(
            f"tp {topology.tp} x pp {topology.pp} = {topology.world_size} ranks do not match"
            f" the {place.world_size} that were started"
        )
    if ranks.meeting is None:
        return World(topology, device=device)
    network = _meet(ranks, ranks.meeting, device, timeout)
    return World(topology, *network.groups(topology.tp, topology.pp), device, network)


def _meet(ranks: Ranks, meeting: Meeting, device: torch.device, timeout: float) -> Network:
    """After this all ranks are there, watch each other, and torch.distributed is ready."""
    place, kind = ranks.place, read_collectives(os.environ)
    _prefer_loopback(meeting)
    set_current(device)
    if ranks.store is None:
        ranks.store = open_store(meeting, place.rank, timeout)
    assert isinstance(ranks.store, dist.Store)
    prefix, processes = roll_call(ranks.store, place, timeout, lambda: ranks.loss)
    watchdog = Watchdog(ranks, dist.PrefixStore(prefix, open_client(meeting, timeout)), processes)
    watchdog.start()
    wanted = device.type == "cpu" and kind == "auto"
    sharing = share_memory(dist.PrefixStore(prefix, ranks.store), place.rank, processes, wanted)
    if sharing.reason and place.local_rank == 0:
        print(f"mindgen: ranks of this host talk over gloo, which is slow here: {sharing.reason}", file=sys.stderr)
    dist.init_process_group(
        backend_name(device),
        store=dist.PrefixStore(f"{prefix}/groups", ranks.store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=LONGEST_WAIT,
    )
    return Network(place.rank, device, watchdog, sharing, processes)


def _prefer_loopback(meeting: Meeting) -> None:
    """The collective libraries ask the environment which network to use; on one host none is needed."""
    if not meeting.one_host:
        return
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None and meeting.own_ranks:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    elif loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
