"""What ranks of a world of 4 (tp 2 x pp 2) do in `test_group.py`: every check runs on all ranks.

Rank 0 writes one line of JSON to stdout: for every check what went wrong, null if nothing.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from mindgen.parallel.group import DTYPES, DistributedGroup, Group, PeerLost
from mindgen.parallel.launch import start_ranks
from mindgen.parallel.place import read_collectives
from mindgen.parallel.shm import SharedGroup
from mindgen.parallel.topology import Topology
from mindgen.parallel.world import RankError, World, connect

IS_GLOO = read_collectives(os.environ) == "gloo"
CHECKS: list[Callable[[World], None]] = []


def check(function: Callable[[World], None]) -> Callable[[World], None]:
    CHECKS.append(function)
    return function


@check
def groups_follow_the_topology(world: World) -> None:
    rank = world.everyone.rank
    assert (world.tp.rank, world.pp.rank) == (rank % 2, rank // 2)
    assert (world.tp.size, world.pp.size, world.everyone.size) == (2, 2, 4)
    assert world.tp.all_gather(torch.tensor([rank]), 0).tolist() == list(world.topology.tp_ranks)
    assert world.pp.all_gather(torch.tensor([rank]), 0).tolist() == list(world.topology.pp_ranks)


@check
def groups_are_of_the_kind_that_was_asked_for(world: World) -> None:
    for group in (world.tp, world.pp, world.everyone):
        assert isinstance(group, DistributedGroup if IS_GLOO else SharedGroup), type(group)


@check
def every_call_does_what_gloo_does_however_they_are_mixed(world: World) -> None:
    """Whole numbers, so that sums are exact in any order and every bit can be compared."""
    if IS_GLOO:
        return
    pairs = [
        (world.everyone, twin(world, [(0, 1, 2, 3)])),
        (world.tp, twin(world, [(0, 1), (2, 3)])),
        (world.pp, twin(world, [(0, 2), (1, 3)])),
    ]
    choices = random.Random(7)
    for _ in range(150):
        group, gloo = choices.choice(pairs)
        operation = choices.choice(OPERATIONS)
        rows, columns = choices.choice([(0, 5), (1, 1), (1, 2048), (3, 7), (8, 2048), (70, 2048), (97, 5003)])
        dtype, number = choices.choice(DTYPES), choices.randrange(1000)
        generator = torch.Generator().manual_seed(number + world.everyone.rank)
        tensor = torch.randint(0, 9, (columns, rows), generator=generator).to(dtype).t()
        ours, theirs = operation(group, tensor, number), operation(gloo, tensor, number)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), f"{operation.__name__} {dtype} {tensor.shape}"


def twin(world: World, rank_lists: list[tuple[int, ...]]) -> DistributedGroup:
    """The same group over gloo."""
    made = {ranks: dist.new_group(list(ranks), backend="gloo") for ranks in rank_lists}
    mine = next(ranks for ranks in made if world.everyone.rank in ranks)
    return DistributedGroup(mine, made[mine])


def reduced(group: Group, tensor: torch.Tensor, number: int) -> torch.Tensor:
    return group.all_reduce(tensor.contiguous())


def gathered(group: Group, tensor: torch.Tensor, number: int) -> torch.Tensor:
    return group.all_gather(tensor, number % 2)


def spread(group: Group, tensor: torch.Tensor, number: int) -> torch.Tensor:
    return group.broadcast(tensor.contiguous(), number % group.size)


def passed_around(group: Group, tensor: torch.Tensor, number: int) -> torch.Tensor:
    group.send(tensor, (group.rank + 1) % group.size)
    return group.receive(torch.empty_like(tensor.contiguous()), (group.rank - 1) % group.size)


def waited(group: Group, tensor: torch.Tensor, number: int) -> torch.Tensor:
    group.barrier()
    return tensor


OPERATIONS = (reduced, gathered, spread, passed_around, waited)


@check
def sums_in_shared_memory_are_of_neighbours_first_and_of_16_bits_in_fp32_in_rank_order(world: World) -> None:
    if IS_GLOO:
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (5, 40_000, 150_001, 400_000):  # within a slot, summed in portions, in several pieces
            tensors = [torch.randn(size, generator=torch.Generator().manual_seed(each)).to(dtype) for each in range(4)]
            first, second, third, fourth = (tensor.float() for tensor in tensors)
            in_pairs, in_turn = (first + second) + (third + fourth), first + second + third + fourth
            expected = in_pairs if dtype == torch.float32 else in_turn
            total = world.everyone.all_reduce(tensors[world.everyone.rank].clone())
            assert torch.equal(total, expected.to(dtype)), f"{size} of {dtype}"


@check
def who_reads_late_reads_what_was_said_in_that_round(world: World) -> None:
    """The source of a broadcast does not wait for readers, but it may not overwrite what they have not read."""
    for number in range(200):
        source = number // 3 % 4
        if world.everyone.rank == number % 4:
            time.sleep(0.001)
        tensor = torch.full((5000,), number if world.everyone.rank == source else -1)
        assert (world.everyone.broadcast(tensor, source) == number).all(), f"round {number}"


@check
def shared_memory_has_no_name_that_could_be_left_behind(world: World) -> None:
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    names = [fields[5] for fields in maps if fields[1] == "rw-s" and len(fields) > 5]
    assert IS_GLOO or "/memfd:mindgen (deleted)" in names
    assert all(name.endswith("(deleted)") for name in names), names


@check
def sums_of_every_dtype_are_right_and_in_place(world: World) -> None:
    for dtype in DTYPES:
        tensor = torch.full((3, 5), world.everyone.rank + 1, dtype=dtype)
        assert world.everyone.all_reduce(tensor) is tensor
        assert tensor.dtype == dtype and (tensor == 10).all(), f"{dtype}: {tensor}"


@check
def sums_leave_the_same_bits_on_every_rank(world: World) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1, 7, 1001, 65537):
            generator = torch.Generator().manual_seed(size + world.everyone.rank)
            total = world.everyone.all_reduce(torch.randn(size, generator=generator).to(dtype))
            bits = world.everyone.all_gather(total.view(torch.uint8)[None], 0)
            assert (bits == bits[0]).all(), f"{size} of {dtype}"


@check
def gathers_concatenate_in_rank_order_along_any_dim(world: World) -> None:
    rank = world.everyone.rank
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 10 * rank
    for dim in (0, 1, -1):
        expected = torch.cat([tensor + 10 * (other - rank) for other in range(4)], dim)
        assert torch.equal(world.everyone.all_gather(tensor, dim), expected)
    assert torch.equal(world.everyone.all_gather(tensor.t(), 0)[:3], torch.arange(6.0).view(2, 3).t())


@check
def tensors_without_elements_travel_too(world: World) -> None:
    empty = torch.empty(0, 8)
    assert world.everyone.all_reduce(empty).shape == (0, 8)
    assert world.everyone.all_gather(empty, 0).shape == (0, 8)
    assert world.everyone.all_gather(empty, 1).shape == (0, 32)
    assert world.everyone.broadcast(empty, 1).shape == (0, 8)
    if world.pp.rank == 0:
        world.pp.send(empty, 1)
    else:
        world.pp.receive(empty, 0)


@check
def broadcasts_count_sources_within_the_group(world: World) -> None:
    for group in (world.everyone, world.tp, world.pp):
        for source in range(group.size):
            tensor = torch.tensor([world.everyone.rank])
            expected = group.all_gather(tensor, 0)[source]
            assert group.broadcast(tensor, source) is tensor
            assert tensor == expected


@check
def sends_return_before_anyone_receives_and_keep_their_tensors_alive(world: World) -> None:
    if world.pp.rank == 0:
        start = time.monotonic()
        for number in range(12):
            world.pp.send(torch.full((1 << 20,), float(number)), 1)  # 4 MiB each, more than any socket holds
        took = time.monotonic() - start
        gc.collect()
        torch.full((1 << 22,), -1.0)  # would land where a tensor was forgotten
        world.everyone.barrier()
        assert took < 5, f"sending took {took:.1f} s"
    else:
        world.everyone.barrier()
        for number in range(12):
            received = torch.empty(1 << 20)
            assert world.pp.receive(received, 0) is received
            assert (received == number).all(), f"message {number} holds {received.unique()}"


@check
def many_sends_in_both_directions_arrive_in_order(world: World) -> None:
    other = 1 - world.pp.rank
    for number in range(60):
        world.pp.send(torch.tensor([number, world.everyone.rank]), other)
        if number >= 10:  # lags behind, as a later stage does
            received = world.pp.receive(torch.empty(2, dtype=torch.int64), other)
            assert received.tolist() == [number - 10, world.topology.pp_ranks[other]]
    for _ in range(10):
        world.pp.receive(torch.empty(2, dtype=torch.int64), other)


@check
def agreeing_on_nothing_wrong_passes(world: World) -> None:
    world.agree(None)


@check
def an_error_on_one_rank_is_raised_on_all(world: World) -> None:
    with pytest.raises(RankError) as caught:
        world.agree("shard 2 is torn: naïve 🙂" if world.everyone.rank == 2 else None)
    assert (caught.value.rank, caught.value.message) == (2, "shard 2 is torn: naïve 🙂")
    assert str(caught.value) == "rank 2: shard 2 is torn: naïve 🙂"


@check
def an_error_that_all_ranks_have_is_told_as_one(world: World) -> None:
    with pytest.raises(RankError) as caught:
        world.agree("no such directory")
    assert str(caught.value) == "no such directory"


@check
def of_several_errors_the_first_ranks_is_told_and_long_ones_are_cut(world: World) -> None:
    with pytest.raises(RankError) as caught:
        world.agree(None if world.everyone.rank == 0 else "é" * 5000 + str(world.everyone.rank))
    assert (caught.value.rank, caught.value.message) == (1, "é" * 2048)


@check
def digests_that_differ_are_refused_with_both(world: World) -> None:
    world.same("the spec", "abc")
    with pytest.raises(RankError, match="the spec differs between ranks: abc on rank 0, xyz on rank 3"):
        world.same("the spec", "xyz" if world.everyone.rank == 3 else "abc")


@check
def a_part_is_a_world_of_its_first_ranks(world: World) -> None:
    rank = world.everyone.rank
    for tp, pp in ((2, 1), (1, 2), (1, 1), (2, 2)):
        part = world.part(tp, pp)
        assert (part is None) == (rank >= tp * pp)
        if part is not None:
            assert part.topology == Topology(rank, tp, pp)
            assert (part.tp.size, part.pp.size, part.everyone.size) == (tp, pp, tp * pp)
            assert part.everyone.all_reduce(torch.ones(1)).item() == tp * pp
            part.close()
    assert world.everyone.all_reduce(torch.ones(1)).item() == 4


@check
def nothing_listens_beyond_loopback(world: World) -> None:
    listening = [entry.laddr for entry in psutil.Process().net_connections() if entry.status == psutil.CONN_LISTEN]
    assert listening, "gloo and rank 0's store listen somewhere"
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}, listening
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo"), "else gloo listens where the host's name points"


@check
def started_ranks_ignore_interrupts_read_nothing_and_write_to_stderr(world: World) -> None:
    if world.everyone.rank == 0:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    else:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert sys.stdin.read() == ""
        assert os.fstat(1) == os.fstat(2)
        assert int(os.environ["OMP_NUM_THREADS"]) >= 1


@check
def a_peer_that_says_nothing_is_an_error_after_the_deadline(world: World) -> None:
    group = DistributedGroup(range(4), dist.new_group(range(4), backend="gloo"), timeout=0.3)
    if world.everyone.rank == 0:
        start = time.monotonic()
        with pytest.raises(PeerLost, match="receive among ranks 0, 1, 2, 3 failed"):
            group.receive(torch.empty(1), 1)
        assert 0.2 < time.monotonic() - start < 10
    world.everyone.barrier()


def run(world: World, one: Callable[[World], None]) -> str | None:
    """What went wrong on any rank, None if nothing did."""
    try:
        try:
            one(world)
        except (AssertionError, pytest.fail.Exception) as error:
            world.agree(f"{error or 'assertion failed'}")
        world.agree(None)
    except RankError as error:
        return str(error)
    return None


def main() -> int:
    torch.set_num_threads(1)
    with start_ranks(4, [], program=(str(Path(__file__)),)) as ranks:
        topology = Topology(ranks.place.rank, tp=2, pp=2)
        with connect(topology, torch.device("cpu"), 90.0, ranks) as world:
            results = {one.__name__: run(world, one) for one in CHECKS}
            if topology.rank == 0:
                print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
