"""Too few blocks, common prompts, small chunks, aborts: every answer is the one that its request gets alone."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindgen.engine.blocks import BlockPool
from mindgen.engine.fits import Sight, blocks_at_once, most_blocks
from mindgen.engine.request import Request
from tests.engine.paged import VOCAB, Arrival, Play, alone, ask, make_play

PREFIXES = tuple(tuple(Random(number).choices(range(VOCAB), k=30)) for number in range(2))


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    return [Arrival(draw(requests(number)), draw(st.integers(0, 20))) for number in range(draw(st.integers(1, 8)))]


@st.composite
def requests(draw: st.DrawFn, number: int) -> Request:
    """Prompts begin alike, so that there is something to reuse."""
    start = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 30))]
    prompt = (*start, *draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)))
    options = draw(st.sampled_from([{}, {}, {}, {"n": 2}, {"n": 4}, {"num_beams": 2}, {"num_beams": 4}]))
    return ask(number, prompt, draw(st.integers(1, 40)), **options)


limits = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 5),
        "reuse": st.booleans(),
        "max_batch_tokens": st.integers(1, 64) | st.integers(1, 4),
        "num_stages": st.sampled_from([1, 2, 3]),
        "max_sequences": st.sampled_from([4, 7, 256]),
    }
)


def tight(asked: list[Arrival], spare: int, limits: dict) -> Play:
    """A pool in which the largest request just fits, and `spare` blocks; at least so many tokens as there are beams."""
    limits["max_batch_tokens"] = max([limits["max_batch_tokens"]] + [one.request.params.num_beams for one in asked])
    size, window = limits["block_size"], limits.get("window")
    sight = Sight(window, limits["max_batch_tokens"]) if window else None
    need = max(most_blocks(arrival.request, BlockPool(1, size), sight) for arrival in asked)
    return make_play(need + spare, **limits)


def check_answers(play: Play, asked: list[Arrival]) -> None:
    for request in [arrival.request for arrival in asked]:
        expected = dict(enumerate(alone(request, play.window)))
        got = play.answers[request.id]
        assert got == expected or (request.id in play.aborted and got.items() <= expected.items())


def test_twenty_thousand_steps_under_pressure():
    num_steps = num_preemptions = num_reused = 0

    @settings(max_examples=330)
    @given(arrivals(), st.integers(0, 12), limits)
    def run(asked: list[Arrival], spare: int, limits: dict) -> None:
        nonlocal num_steps, num_preemptions, num_reused
        play = tight(asked, spare, limits)
        play.play(asked)
        check_answers(play, asked)
        assert all(sum(chunk.length for chunk in step.chunks) <= limits["max_batch_tokens"] for step in play.steps)
        stats = play.scheduler.stats
        num_steps += len(play.steps)
        num_preemptions += stats.num_preemptions
        num_reused += stats.num_reused_tokens

    run()
    assert num_steps > 20_000, num_steps
    assert num_preemptions > 500 and num_reused > 5_000, (num_preemptions, num_reused)


def test_what_no_layer_sees_any_more_is_given_back():
    num_preemptions = num_reused = num_saved = 0

    @settings(max_examples=100)
    @given(arrivals(), st.integers(0, 12), limits, st.integers(1, 20), st.integers(1, 12))
    def run(asked: list[Arrival], spare: int, limits: dict, window: int, most_tokens: int) -> None:
        nonlocal num_preemptions, num_reused, num_saved
        limits = limits | {"window": window, "max_batch_tokens": min(limits["max_batch_tokens"], most_tokens)}
        play = tight(asked, spare, limits)
        play.play(asked)
        check_answers(play, asked)
        pool = BlockPool(1, limits["block_size"])
        assert play.most_held <= Sight(window, limits["max_batch_tokens"]).most_blocks(pool)
        stats = play.scheduler.stats
        num_preemptions += stats.num_preemptions
        num_reused += stats.num_reused_tokens
        longest = max(most_blocks(one.request, pool) for one in asked)
        num_saved += longest > play.scheduler.pool.num_blocks

    run()
    assert num_preemptions > 25 and num_reused > 300 and num_saved > 15, (num_preemptions, num_reused, num_saved)


def test_what_outgrows_the_short_context_is_computed_anew():
    """No key of a short sequence is seen by a long one, nor the other way round; `Play` looks at every one."""
    num_crossings = num_preemptions = num_reused = 0

    @settings(max_examples=150)
    @given(arrivals(), st.integers(0, 12), limits, st.integers(5, 40), st.none() | st.integers(1, 30))
    def run(asked: list[Arrival], spare: int, limits: dict, short_context: int, window: int | None) -> None:
        nonlocal num_crossings, num_preemptions, num_reused
        play = tight(asked, spare, limits | {"window": window} | {"short_context": short_context})
        play.play(asked)
        check_answers(play, asked)
        lengths = [(len(one.request.prompt), one.request.params.max_new_tokens) for one in asked]
        num_crossings += sum(prompt <= short_context < prompt + new - 1 for prompt, new in lengths)
        stats = play.scheduler.stats
        num_preemptions += stats.num_preemptions
        num_reused += stats.num_reused_tokens

    run()
    assert num_crossings > 100, num_crossings
    assert num_preemptions > 100 and num_reused > 1000, (num_preemptions, num_reused)


def test_a_long_answer_fits_into_the_blocks_of_its_window():
    window, chunk, size = 8, 4, 4
    need = Sight(window, chunk).most_blocks(BlockPool(1, size))
    play = make_play(need, size, window=window, max_batch_tokens=chunk)
    asked = [Arrival(ask(0, [1, 2, 3] * 20, 100))]
    play.play(asked)
    check_answers(play, asked)
    assert play.most_held <= need == 4 and play.scheduler.stats.num_preemptions == 0
    with pytest.raises(ValueError, match="takes 40 blocks of 4 tokens, but the cache has 4"):
        make_play(need, size, max_batch_tokens=chunk).play(asked)


def runs_at_once(num_blocks: int, asked: list[Request], size: int, **limits: int) -> bool:
    """Whether all are in every step from the first on, which has room for the tokens of all prompts."""
    try:
        play = make_play(num_blocks, size, **limits)
        play.play([Arrival(request) for request in asked])
    except ValueError:  # one that would never fit
        return False
    return len(play.steps) == asked[0].params.max_new_tokens


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 8, 9])
@pytest.mark.parametrize("num_new", [1, 2, 5, 12])
def test_a_batch_runs_at_once_in_the_fewest_blocks_that_are_said_and_in_none_less(num_prompt: int, num_new: int):
    size = 4
    for count in (1, 2, 5):
        asked = [ask(number, (number,) * num_prompt, num_new) for number in range(count)]
        need = blocks_at_once(asked[0], count, BlockPool(1, size))
        assert runs_at_once(need, asked, size, max_batch_tokens=100)
        assert not runs_at_once(need - 1, asked, size, max_batch_tokens=100)
        for options, limits in (({"num_beams": 3}, {}), ({}, {"window": 3}), ({}, {"window": 6})):
            sight = Sight(limits["window"], 100) if "window" in limits else None
            asked = [ask(number, (number,) * num_prompt, num_new, **options) for number in range(count)]
            need = blocks_at_once(asked[0], count, BlockPool(1, size), sight)
            assert runs_at_once(need, asked, size, max_batch_tokens=100, **limits)


def test_blocks_out_of_sight_are_no_reason_to_say_that_a_batch_has_no_room():
    asked, sight = [ask(number, (number,) * 4, 100) for number in range(3)], Sight(8, 12)
    need = blocks_at_once(asked[0], 3, BlockPool(1, 4), sight)
    assert need == 3 * sight.most_blocks(BlockPool(1, 4)) < blocks_at_once(asked[0], 3, BlockPool(1, 4))
    assert runs_at_once(need, asked, 4, max_batch_tokens=12, window=8)


@settings(max_examples=80)
@given(arrivals(), st.lists(st.none() | st.integers(0, 25), min_size=8, max_size=8), st.integers(0, 8), limits)
def test_an_abort_at_any_moment_returns_every_block(asked, patience, spare, limits):
    asked = [Arrival(one.request, one.turn, wait) for one, wait in zip(asked, patience, strict=False)]
    play = tight(asked, spare, limits)
    play.play(asked)
    check_answers(play, asked)


def test_a_thousand_aborted_requests_leak_nothing():
    play = make_play(24, 2, max_batch_tokens=16, num_stages=2)
    random = Random(5)
    asked = [
        Arrival(
            ask(number, random.choices(range(VOCAB), k=random.randint(1, 12)), 20, n=random.randint(1, 3)),
            turn=number // 4,
            patience=random.randint(0, 12),
        )
        for number in range(1000)
    ]
    play.play(asked)
    assert len(play.aborted) == 1000 and not play.scheduler.sequences
