"""The runner: every split into ranks computes what one rank computes. Ranks are threads that talk through queues."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue

import pytest
import torch
from torch import Tensor

from mindgen.attention.reference import ReferenceAttention, ReferenceContext
from mindgen.attention.scores import Scores
from mindgen.engine.blocks import BlockPool
from mindgen.engine.engine import Engine
from mindgen.engine.kv_cache import KVCache
from mindgen.engine.request import Output, Request, SamplingParams
from mindgen.engine.runner import Runner
from mindgen.engine.scheduler import Scheduler
from mindgen.parallel.group import Group, SingleGroup
from mindgen.parallel.topology import SINGLE, Topology, split_layers
from mindgen.parallel.world import World
from tests.engine.fakes import run, token_ids

NUM_LAYERS, HIDDEN, VOCAB = 3, 8, 20
NUM_BLOCKS, BLOCK_SIZE = 40, 4
SCORES = Scores(HIDDEN**-0.5, (None,) * NUM_LAYERS)


@dataclass
class QueueGroup:
    """Ranks in one process. A sent tensor stays the sender's own object, so that a change after `send` is seen."""

    rank: int
    queues: dict[tuple[int, int], Queue[Tensor]]
    size: int
    sent: int = field(default=0)

    def send(self, tensor: Tensor, destination: int) -> None:
        assert tensor.numel(), "not every library can send nothing"
        self.sent += 1
        self.queues[self.rank, destination].put(tensor)

    def receive(self, tensor: Tensor, source: int, timeout: float | None = None) -> Tensor:
        arrived = self.queues[source, self.rank].get(timeout=20)
        assert (arrived.shape, arrived.dtype) == (tensor.shape, tensor.dtype)
        return tensor.copy_(arrived)

    def broadcast(self, tensor: Tensor, source: int = 0, timeout: float | None = None) -> Tensor:
        if self.rank != source:
            return self.receive(tensor, source)
        for other in range(self.size):
            if other != source:
                self.send(tensor.clone(), other)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int, timeout: float | None = None) -> Tensor:
        for other in range(self.size):
            self.send(tensor.clone(), other)
        return torch.cat([self.receive(torch.empty_like(tensor), source) for source in range(self.size)], dim)

    def all_reduce(self, tensor: Tensor, timeout: float | None = None) -> Tensor:
        raise AssertionError("the runner sums nothing")

    def barrier(self, timeout: float | None = None) -> None:
        raise AssertionError("the runner has no barrier")

    def close(self) -> None:
        pass


def group_of(ranks: tuple[int, ...], rank: int, made: dict[tuple[int, ...], dict]) -> QueueGroup:
    places = range(len(ranks))
    queues = made.setdefault(ranks, {(one, other): Queue() for one in places for other in places})
    return QueueGroup(ranks.index(rank), queues, len(ranks))


class TinyStage:
    """Attention over the real cache and nothing else; every layer has a number of its own. A rank of a tensor group
    has all of it, but knows only its share of the logits."""

    hidden_size, dtype = HIDDEN, torch.float32

    def __init__(self, topology: Topology, tp: Group) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.layers = split_layers(NUM_LAYERS, topology.pp)[topology.pp_rank]
        self.topology, self.tp = topology, tp

    def forward(self, inputs: Tensor, context: ReferenceContext) -> Tensor:
        hidden = self.embedding[inputs] if self.topology.is_first_stage else inputs
        for local, number in enumerate(self.layers):
            heads = hidden[:, None, :] * (1 + number)  # [T, 1, HIDDEN]
            hidden = (hidden + context.attend(local, heads, heads, heads.roll(number + 1, -1))[:, 0]).tanh() * 2
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        assert self.topology.is_last_stage and len(hidden)
        share = VOCAB // self.tp.size
        local = hidden @ self.embedding[self.tp.rank * share :][:share].T
        return self.tp.all_gather(local, dim=-1)


def make_runner(topology: Topology, groups: dict, cached: bool) -> Runner:
    tp, pp = group_of(topology.tp_ranks, topology.rank, groups), group_of(topology.pp_ranks, topology.rank, groups)
    stage = TinyStage(topology, tp)
    shape = (len(stage.layers), NUM_BLOCKS, BLOCK_SIZE, 1, HIDDEN)
    cache = KVCache(*shape, dtype=torch.float32, device="cpu") if cached else None
    return Runner(stage, cache, ReferenceAttention(SCORES), World(topology, tp, pp), torch.device("cpu"))


@contextmanager
def started(tp: int, pp: int, cached: bool) -> Iterator[Engine]:
    """An engine on rank 0 whose followers are threads; they must all end when it is closed."""
    groups: dict[tuple[int, ...], dict] = {}
    runners = [make_runner(Topology(rank, tp, pp), groups, cached) for rank in range(tp * pp)]
    threads = [threading.Thread(target=runner.follow, daemon=True) for runner in runners[1:]]
    for thread in threads:
        thread.start()
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE) if cached else None
    engine = Engine(Scheduler(pool, max_batch_tokens=9, num_stages=pp), runners[0], eos_ids=(4,), vocab_size=VOCAB)
    yield engine
    engine.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    left = [queue for queues in groups.values() for queue in queues.values() if not queue.empty()]
    assert not left, "something was sent that nobody waits for"


def requests() -> list[Request]:
    """Chunked and short prompts, samples that fork, beams that reorder, penalties, and seeds."""
    return [
        Request(0, tuple(range(19)), SamplingParams(max_new_tokens=5, temperature=0.0)),
        Request(1, (1, 2), SamplingParams(max_new_tokens=9, seed=3, top_k=5)),
        Request(2, (5, 6, 7), SamplingParams(max_new_tokens=7, seed=2**64 - 1, n=2, logprobs=2)),
        Request(3, (9,) * 6, SamplingParams(max_new_tokens=8, num_beams=3, n=2, temperature=0.0)),
        Request(4, (3,), SamplingParams(max_new_tokens=8, repetition_penalty=1.3, top_p=0.8, seed=1)),
        Request(5, tuple(range(13)), SamplingParams(max_new_tokens=6, n=2, prompt_logprobs=3, min_p=0.05, seed=5)),
        Request(6, (2, 2), SamplingParams(max_new_tokens=7, frequency_penalty=1.0, logit_bias={1: 3.0}, seed=6)),
    ]


@pytest.fixture(scope="module")
def alone() -> dict[tuple[int, int], tuple[int, ...]]:
    """Each request on one rank, one after the other, without a cache."""
    tokens = {}
    for request in requests():
        with started(1, 1, cached=False) as engine:
            tokens |= token_ids(run(engine, request))
    return tokens


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)])
def test_every_split_gives_the_tokens_of_one_rank(alone, tp, pp, cached):
    with started(tp, pp, cached) as engine:
        assert token_ids(run(engine, *requests())) == alone


def prompt_logprobs(outputs: list[Output]) -> list[float]:
    return [one.logprob for output in outputs for one in output.prompt_logprobs or () if one.logprob is not None]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_every_split_gives_the_log_probabilities_of_one_rank(tp, pp):
    scored = [request for request in requests() if request.params.prompt_logprobs is not None]
    with started(1, 1, True) as engine:
        alone = prompt_logprobs(run(engine, *scored))
    with started(tp, pp, True) as engine:
        together = [output for output in run(engine, *requests()) if output.request_id == scored[0].id]
    assert len(alone) == 2 * 12 and prompt_logprobs(together) == pytest.approx(alone, abs=1e-5)


def test_a_long_prompt_is_scored_a_few_rows_at_a_time():
    """The logits of a whole prompt would need gigabytes."""
    sizes = []

    class Watched(TinyStage):
        def logits(self, hidden: Tensor) -> Tensor:
            sizes.append(len(hidden))
            return super().logits(hidden)

    world = World()
    runner = Runner(Watched(SINGLE, SingleGroup()), None, ReferenceAttention(SCORES), world, torch.device("cpu"))
    engine = Engine(Scheduler(None, max_batch_tokens=1000), runner)
    prompt = tuple(token % VOCAB for token in range(600))
    (output,) = run(engine, Request(0, prompt, SamplingParams(max_new_tokens=1, prompt_logprobs=0)))
    assert sizes == [1, 256, 256, 87] and len(output.prompt_logprobs) == 600


def test_a_run_can_be_closed_while_steps_are_in_flight():
    with started(2, 2, cached=True) as engine:
        for request in requests():
            engine.submit(request)
        engine.step()


def test_one_rank_talks_to_nobody():
    stage = TinyStage(SINGLE, SingleGroup())
    cache = KVCache(NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, 1, HIDDEN, torch.float32, "cpu")
    runner = Runner(stage, cache, ReferenceAttention(SCORES), World(), torch.device("cpu"))
    engine = Engine(Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE)), runner)
    assert run(engine, *requests())  # a group of one raises when something is sent
    engine.close()


def test_hidden_states_and_control_go_to_the_next_stage_and_only_rows_come_back():
    """Three sends a step from the first stage, one back from the last."""
    groups: dict[tuple[int, ...], dict] = {}
    first, last = (make_runner(Topology(rank, 1, 2), groups, True) for rank in range(2))
    thread = threading.Thread(target=last.follow, daemon=True)
    thread.start()
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE), max_batch_tokens=4)
    engine = Engine(scheduler, first)
    run(engine, Request(0, (1, 2, 3, 4, 5), SamplingParams(max_new_tokens=2)))  # 2 chunks, the first without samples
    engine.close()
    thread.join(timeout=10)
    assert first.world.pp.sent == 3 * 3 + 1  # the last one says stop
    assert last.world.pp.sent == 3
