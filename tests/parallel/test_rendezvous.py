import socket

import pytest
import torch.distributed as dist

from mindgen.parallel.place import Meeting, Place
from mindgen.parallel.process import Process
from mindgen.parallel.rendezvous import RendezvousError, open_client, open_store, roll_call


def meeting_at(port: int, host: str = "127.0.0.1") -> Meeting:
    return Meeting(host, port, "job", one_host=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_missing_ranks_are_named():
    store = dist.HashStore()
    store.set("1/process/2", str(Process.mine()))
    with pytest.raises(RendezvousError, match=r"2 of 4 ranks did not start within 0.1 s: rank 1, 3"):
        roll_call(store, Place(0, 4), timeout=0.1)


def test_a_loss_ends_the_waiting_at_once():
    with pytest.raises(RendezvousError, match="rank 1 died"):
        roll_call(dist.HashStore(), Place(0, 2), timeout=3600, loss=lambda: "rank 1 died")


def test_a_rank_number_that_two_processes_claim_is_refused():
    store = dist.HashStore()
    store.add("arrivals/0", 1)
    store.set("1/process/0", "another-boot 1 1")
    with pytest.raises(RendezvousError, match="another process is already rank 0"):
        roll_call(store, Place(0, 1), timeout=1)


def test_ranks_that_connect_again_use_other_keys():
    store = dist.HashStore()
    first, _ = roll_call(store, Place(0, 1), timeout=1)
    second, processes = roll_call(store, Place(0, 1), timeout=1)
    assert first != second
    assert processes == (Process.mine(),)


def test_rank_0_keeps_the_store_on_the_address_that_was_given():
    port = free_port()
    store = open_store(meeting_at(port), rank=0, timeout=5)
    store.set("word", "hello")
    assert open_client(meeting_at(port), timeout=5).get("word") == b"hello"
    with socket.create_server(("127.0.0.2", port)):
        pass  # free: so rank 0 does not listen on all addresses


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RendezvousError, match=f"cannot listen on 127.0.0.1:{port} .*choose another MASTER_PORT"):
            open_store(meeting_at(port), rank=0, timeout=1)


def test_a_host_that_does_not_exist_is_named_at_once():
    with pytest.raises(RendezvousError, match=r"MASTER_ADDR 'no-such-host\.invalid'"):
        open_store(meeting_at(29500, "no-such-host.invalid"), rank=1, timeout=60)


def test_a_rank_that_finds_no_rank_0_says_where_it_looked():
    port = free_port()
    with pytest.raises(RendezvousError, match=f"rank 1 reached nobody at 127.0.0.1:{port} within 1 s"):
        open_store(meeting_at(port), rank=1, timeout=1)
