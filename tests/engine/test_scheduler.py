"""Blocks and steps: who owns what, and who runs next."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mindgen.engine.blocks import BlockPool
from mindgen.engine.request import Request, SamplingParams, Sequence
from mindgen.engine.scheduler import Scheduler, Step


def sequence(number: int, num_prompt: int = 4, num_new: int = 4, **options) -> Sequence:
    params = SamplingParams(max_new_tokens=num_new, **options)
    return Sequence.start(Request(number, tuple(range(num_prompt)), params), seed=0)


def lengths(step: Step | None) -> list[tuple[int, int, int]]:
    """(request, start, length) of every chunk."""
    assert step
    return [(chunk.sequence.request.id, chunk.start, chunk.length) for chunk in step.chunks]


def answer(scheduler: Scheduler, step: Step | None) -> None:
    """Commit with some token for every row."""
    assert step
    scheduler.commit(step)
    for chunk in step.chunks:
        for one in scheduler.split(chunk.sequence) if chunk.num_samples else []:
            one.tokens.append(1)


class Pool(RuleBasedStateMachine):
    """Any order of allocate, share and release, against a list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5, 4)
        self.holdings: list[list[int]] = []

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert not any(block in held for held in self.holdings)
        self.holdings.append([block])

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        self.holdings.append(self.pool.share(data.draw(st.sampled_from(self.holdings))))

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holdings.pop(data.draw(st.integers(0, len(self.holdings) - 1))))

    @invariant()
    def adds_up(self) -> None:
        held = [block for blocks in self.holdings for block in blocks]
        assert self.pool.num_used == len(set(held)) == self.pool.num_blocks - self.pool.num_free
        assert all(self.pool.is_shared(block) == (held.count(block) > 1) for block in held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_releasing_twice_is_a_bug_of_ours():
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])
    with pytest.raises(AssertionError):
        pool.share([block])


def test_decodes_come_before_prompts_and_a_long_prompt_takes_what_is_left():
    scheduler = Scheduler(BlockPool(50, 4), max_batch_tokens=8)
    scheduler.submit(sequence(0, num_prompt=4))
    scheduler.submit(sequence(1, num_prompt=9))
    first = scheduler.schedule()
    assert lengths(first) == [(0, 0, 4), (1, 0, 4)]
    answer(scheduler, first)
    scheduler.submit(sequence(2, num_prompt=7))
    second = scheduler.schedule()
    assert lengths(second) == [(0, 4, 1), (1, 4, 5), (2, 0, 2)]
    assert [chunk.num_samples for chunk in second.chunks] == [1, 1, 0]
    answer(scheduler, second)
    assert lengths(scheduler.schedule()) == [(0, 5, 1), (1, 9, 1), (2, 2, 5)]


def test_a_decode_does_not_wait_behind_the_chunks_of_an_earlier_prompt():
    scheduler = Scheduler(BlockPool(50, 4), max_batch_tokens=8)
    scheduler.submit(sequence(0, num_prompt=25))
    scheduler.submit(sequence(1, num_prompt=1))
    for start in range(3):
        step = scheduler.schedule()
        assert lengths(step) == [(1, start, 1), (0, 7 * start, 7)]
        answer(scheduler, step)


def test_a_request_waits_until_the_blocks_for_its_longest_answer_are_free():
    scheduler = Scheduler(BlockPool(5, 4))
    scheduler.submit(sequence(0, num_prompt=4, num_new=8))  # 3 blocks
    scheduler.submit(sequence(1, num_prompt=4, num_new=8))
    scheduler.submit(sequence(2, num_prompt=1, num_new=1))  # would fit, but came later
    step = scheduler.schedule()
    assert lengths(step) == [(0, 0, 4)]
    answer(scheduler, step)
    scheduler.finish(step.chunks[0].sequence)
    assert {number for number, _, _ in lengths(scheduler.schedule())} == {1, 2}


def test_a_sequence_in_flight_is_left_alone():
    scheduler = Scheduler(BlockPool(50, 4), num_stages=2)
    scheduler.submit(sequence(0))
    assert scheduler.schedule()
    assert scheduler.schedule() is None


@pytest.mark.parametrize(
    ("num_sequences", "num_stages", "shares"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (3, 4, [1, 1, 1, 0])]
)
def test_every_stage_gets_its_share(num_sequences, num_stages, shares):
    scheduler = Scheduler(BlockPool(50, 4), num_stages=num_stages)
    for number in range(num_sequences):
        scheduler.submit(sequence(number))
    for turn in range(3):
        steps = [scheduler.schedule() for _ in range(num_stages)]
        assert [len(step.chunks) if step else 0 for step in steps] == shares, turn
        for step in filter(None, steps):
            answer(scheduler, step)


def test_beams_run_in_one_step_or_not_at_all():
    scheduler = Scheduler(BlockPool(50, 4), max_batch_tokens=5, num_stages=2)
    scheduler.submit(sequence(0, num_beams=3))
    step = scheduler.schedule()
    scheduler.commit(step)
    beams = scheduler.replace([step.chunks[0].sequence] * 3)
    for beam in beams:
        beam.tokens.append(1)
    scheduler.submit(sequence(1))
    assert lengths(scheduler.schedule()) == [(0, 4, 1)] * 3
    assert lengths(scheduler.schedule()) == [(1, 0, 4)]


def test_samples_share_the_prompt_and_copy_the_block_they_write_to():
    pool = BlockPool(50, 4)
    scheduler = Scheduler(pool)
    scheduler.submit(sequence(0, num_prompt=6, n=3))
    step = scheduler.schedule()
    answer(scheduler, step)
    first, second, third = scheduler.sequences
    assert first.blocks == second.blocks == third.blocks and pool.num_used == 2
    step = scheduler.schedule()
    old = first.blocks[0], third.blocks[1]
    assert step.copies == ((old[1], first.blocks[1]), (old[1], second.blocks[1]))  # the last one needs no copy
    assert {one.blocks[0] for one in scheduler.sequences} == {old[0]}
    assert len({one.blocks[1] for one in scheduler.sequences}) == 3 and pool.num_used == 4


def test_a_full_block_is_never_copied():
    scheduler = Scheduler(BlockPool(50, 4))
    scheduler.submit(sequence(0, num_prompt=8, n=2))
    answer(scheduler, scheduler.schedule())
    assert scheduler.schedule().copies == ()


def test_equal_runs_get_equal_blocks():
    def tables() -> list[list[int]]:
        scheduler = Scheduler(BlockPool(30, 2), max_batch_tokens=6)
        for number in range(4):
            scheduler.submit(sequence(number, num_prompt=3 + number, n=1 + number % 2))
        for _ in range(6):
            answer(scheduler, scheduler.schedule())
        return [one.blocks for one in scheduler.sequences]

    assert tables() == tables()


def test_without_a_cache_a_step_computes_whole_sequences_and_one_may_be_too_long():
    scheduler = Scheduler(None, max_batch_tokens=10)
    for number, num_prompt in enumerate((30, 6, 4)):
        scheduler.submit(sequence(number, num_prompt=num_prompt))
    step = scheduler.schedule()
    assert lengths(step) == [(0, 0, 30)]
    answer(scheduler, step)
    scheduler.abort(0)
    step = scheduler.schedule()
    assert lengths(step) == [(1, 0, 6), (2, 0, 4)]
    answer(scheduler, step)
    assert lengths(scheduler.schedule()) == [(1, 0, 7)]


@pytest.mark.parametrize(
    ("limits", "asked", "numbers"),
    [
        ({"num_blocks": 5}, {"num_prompt": 9, "num_new": 12}, ("9 prompt tokens", "6 blocks of 4", "has 5")),
        ({"num_blocks": 5}, {"num_prompt": 8, "num_new": 5, "n": 2}, ("2 sequences", "6 blocks")),
        ({"max_positions": 16}, {"num_prompt": 10, "num_new": 7}, ("together 17", "context is 16", "to 6 or less")),
        ({"max_sequences": 3}, {"n": 4}, ("4 sequences", "at most 3")),
        ({"max_batch_tokens": 3}, {"num_beams": 4}, ("4 beams", "takes 3 tokens")),
    ],
)
def test_a_request_that_can_never_fit_is_refused_with_the_numbers(limits, asked, numbers):
    scheduler = Scheduler(BlockPool(limits.pop("num_blocks", 50), 4), **limits)
    with pytest.raises(ValueError) as caught:
        scheduler.submit(sequence(0, **asked))
    assert all(number in str(caught.value) for number in numbers), caught.value
    assert not scheduler.has_work


def test_an_id_is_used_once_at_a_time():
    scheduler = Scheduler(BlockPool(50, 4))
    scheduler.submit(sequence(3))
    with pytest.raises(ValueError, match="request 3 is in progress"):
        scheduler.submit(sequence(3))
    scheduler.abort(3)
    scheduler.submit(sequence(3))


@pytest.mark.parametrize("name", ["max_batch_tokens", "num_stages", "max_sequences"])
def test_a_size_below_one_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Scheduler(BlockPool(1, 1), **{name: 0})
