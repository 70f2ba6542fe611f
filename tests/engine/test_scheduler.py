"""Steps: who runs next, who gives up its blocks, and what is not computed again."""

from __future__ import annotations

import pytest

from mindgen.engine.blocks import BlockPool
from mindgen.engine.request import Request, SamplingParams, Sequence
from mindgen.engine.scheduler import Scheduler, Step
from mindgen.engine.units import MOST_OVERTAKEN


def sequence(number: int, num_prompt: int = 4, num_new: int = 4, **options) -> Sequence:
    params = SamplingParams(max_new_tokens=num_new, **options)
    return Sequence.start(Request(number, (1000 + number, *range(1, num_prompt)), params), seed=0)


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


def test_what_just_fits_is_not_refused():
    scheduler = Scheduler(BlockPool(5, 4))
    scheduler.submit(sequence(0, num_prompt=9, num_new=12))  # its last token needs no place
    scheduler.submit(sequence(1, num_prompt=8, num_new=13, n=3))  # samples can take turns
    scheduler.submit(sequence(2, num_prompt=8, num_new=5, num_beams=3))


def growing(num_blocks: int, num_steps: int) -> Scheduler:
    """Two sequences that answered for some steps; every second step each takes a block of two tokens."""
    scheduler = Scheduler(BlockPool(num_blocks, 2))
    for number in range(2):
        scheduler.submit(sequence(number, num_prompt=2, num_new=6))
    for _ in range(num_steps):
        answer(scheduler, scheduler.schedule())
    assert [one.num_computed for one in scheduler.sequences] == [1 + num_steps] * 2
    return scheduler


def test_the_last_admitted_gives_up_its_blocks_and_is_the_first_to_come_back():
    scheduler = growing(num_blocks=4, num_steps=3)
    scheduler.submit(sequence(2, num_prompt=2, num_new=1))
    first, last, _ = scheduler.sequences
    step = scheduler.schedule()
    assert lengths(step) == [(0, 4, 1)]
    assert (last.blocks, last.num_computed, len(last.tokens)) == ([], 0, 5)
    assert scheduler.stats.num_preemptions == 1 and scheduler.stats.num_waiting == 2
    answer(scheduler, step)
    scheduler.finish(first)
    assert lengths(scheduler.schedule()) == [(1, 2, 3)]  # its first block was still there


def test_who_was_admitted_last_waits_in_its_place_with_what_it_has():
    scheduler = growing(num_blocks=5, num_steps=3)
    first, last = scheduler.sequences
    step = scheduler.schedule()
    assert lengths(step) == [(0, 4, 1)] and last.num_computed == 4
    answer(scheduler, step)
    scheduler.finish(first)
    assert lengths(scheduler.schedule()) == [(1, 4, 1)]
    assert scheduler.stats.num_preemptions == 0


def test_those_in_flight_keep_their_blocks():
    scheduler = Scheduler(BlockPool(4, 2), num_stages=2)
    for number in range(2):
        scheduler.submit(sequence(number, num_prompt=2, num_new=6))
    for _ in range(2):
        steps = [scheduler.schedule(), scheduler.schedule()]
        for step in steps:
            answer(scheduler, step)
    ahead, last = scheduler.schedule(), scheduler.schedule()
    answer(scheduler, ahead)
    assert scheduler.schedule() is None  # the first needs a block, and only the one in flight could give it
    answer(scheduler, last)
    assert lengths(scheduler.schedule()) == [(0, 4, 1)]
    assert scheduler.stats.num_preemptions == 1


def test_smaller_ones_pass_who_waits_for_blocks_but_not_for_ever():
    scheduler = Scheduler(BlockPool(20, 4))
    scheduler.submit(sequence(0, num_prompt=40, num_new=40))
    answer(scheduler, scheduler.schedule())
    scheduler.submit(sequence(1, num_prompt=60))
    for number in range(2, 2 + MOST_OVERTAKEN):
        scheduler.submit(sequence(number, num_prompt=3, num_new=1))
        step = scheduler.schedule()
        assert [number for number, _, _ in lengths(step)] == [0, number]
        answer(scheduler, step)
        scheduler.finish(step.chunks[1].sequence)
    scheduler.submit(sequence(99, num_prompt=3, num_new=1))
    step = scheduler.schedule()
    assert [number for number, _, _ in lengths(step)] == [0]
    answer(scheduler, step)
    scheduler.abort(0)
    assert [number for number, _, _ in lengths(scheduler.schedule())] == [1, 99]


def asked_again(num_prompt: int, reuse: bool = True, **changes) -> tuple[Scheduler, int]:
    """A prompt that was computed before, with changes to its sequence; where its computation starts."""
    scheduler = Scheduler(BlockPool(50, 4, reuse))
    for number in range(2):
        one = sequence(0, num_prompt=num_prompt)
        for name, value in changes.items() if number else ():
            setattr(one, name, value)
        scheduler.submit(one)
        step = scheduler.schedule()
        answer(scheduler, step)
        scheduler.abort(0)
    return scheduler, step.chunks[0].start


@pytest.mark.parametrize(("num_prompt", "start"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_full_blocks_are_computed_once_and_one_token_is_always_left(num_prompt, start):
    scheduler, started = asked_again(num_prompt)
    stats = scheduler.stats
    assert started == start == stats.num_reused_tokens
    assert stats.num_computed_tokens == 2 * num_prompt - start
    assert (stats.num_used_blocks, stats.num_cached_blocks) == (0, num_prompt // 4)


@pytest.mark.parametrize("changes", [{"reuse": False}, {"salt": "adapter"}, {"tokens": [7, *range(8)]}])
def test_what_is_different_or_must_be_computed_is_not_reused(changes):
    assert asked_again(9, **changes)[1] == 0


def test_reuse_can_be_turned_off():
    scheduler, start = asked_again(9, reuse=False)
    assert start == 0 == scheduler.stats.num_cached_blocks
    for number in range(2):  # nor is it shared while its owner lives
        one = sequence(number)
        one.tokens[:] = range(9)
        scheduler.submit(one)
        step = scheduler.schedule()
        answer(scheduler, step)
    assert lengths(step) == [(0, 9, 1), (1, 0, 9)] and scheduler.pool.num_used == 6


def with_equal_prompts(count: int = 2, num_prompt: int = 9, **limits) -> Scheduler:
    scheduler = Scheduler(BlockPool(50, 4), **limits)
    for number in range(count):
        one = sequence(number)
        one.tokens[:] = range(num_prompt)
        scheduler.submit(one)
    return scheduler


def test_who_begins_as_somebody_in_flight_does_waits_for_what_that_one_computes():
    scheduler = with_equal_prompts(3)
    other = sequence(9)
    scheduler.submit(other)
    first = scheduler.schedule()
    assert lengths(first) == [(0, 0, 9), (9, 0, 4)]
    answer(scheduler, first)
    second = scheduler.schedule()
    assert lengths(second) == [(0, 9, 1), (9, 4, 1), (1, 8, 1), (2, 8, 1)]
    answer(scheduler, second)
    assert scheduler.stats.num_computed_tokens == 9 + 4 + 4


def test_who_waits_for_a_long_prompt_goes_on_where_the_other_is():
    """The last tokens of the long one leave room in their step, but its block is not there yet."""
    scheduler, found = with_equal_prompts(num_prompt=14, max_batch_tokens=8), []
    for _ in range(3):
        step = scheduler.schedule()
        found.append(lengths(step))
        answer(scheduler, step)
    assert found == [[(0, 0, 8)], [(0, 8, 6)], [(0, 14, 1), (1, 12, 2)]]


@pytest.mark.parametrize("prompt_is_done", [True, False])
def test_who_waits_for_another_stage_goes_on_when_that_one_is_aborted(prompt_is_done):
    scheduler = with_equal_prompts(num_stages=2, max_batch_tokens=9 if prompt_is_done else 5)
    step = scheduler.schedule()
    assert scheduler.schedule() is None
    scheduler.abort(0)
    scheduler.commit(step)
    assert lengths(scheduler.schedule()) == [(1, 8, 1) if prompt_is_done else (1, 4, 5)]


def test_nobody_waits_for_what_is_there_already():
    scheduler, _ = asked_again(9)
    for number, reuse in enumerate([False, True]):
        one = sequence(number)
        one.tokens[:], one.reuse = sequence(0, num_prompt=9).tokens, reuse
        scheduler.submit(one)
    assert lengths(scheduler.schedule()) == [(0, 0, 9), (1, 8, 1)]


def test_the_same_prompt_computed_twice_at_once_is_kept_once():
    scheduler = with_equal_prompts()
    scheduler.sequences[1].reuse = False  # so that it does not wait for the other
    answer(scheduler, scheduler.schedule())
    first, second = scheduler.sequences
    assert first.blocks[:2] == second.blocks[:2] and scheduler.pool.num_used == 4


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
        ({"num_blocks": 5}, {"num_prompt": 9, "num_new": 13}, ("9 prompt tokens", "6 blocks of 4", "has 5")),
        ({"num_blocks": 7}, {"num_prompt": 8, "num_new": 6, "num_beams": 3}, ("3 beams", "8 blocks", "has 7")),
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
