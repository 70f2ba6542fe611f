"""What is kept up of a sequence's tokens is what a look at all of them says."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mindgen.engine.params import SamplingParams
from mindgen.engine.past import NEVER, Past, Rules

ENDS = (2, 5)
BAD = ((4,), (1, 2), (3, 3, 1), (1, 1), (2, 1))

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=12)
chosen = st.fixed_dictionaries(
    {"max_new_tokens": st.just(20)},
    optional={
        "presence_penalty": st.sampled_from([0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.25, -0.5]),
        "repetition_penalty": st.just(1.5),
        "min_new_tokens": st.integers(1, 8),
        "logit_bias": st.dictionaries(st.integers(0, 5), st.sampled_from([2.0, -4.0])),
    },
)


def looked_up(params: SamplingParams, prompt: list[int], said: list[int]) -> dict[int, float]:
    """From scratch."""
    text, added = prompt + said, Counter(dict(params.logit_bias))
    for token, count in Counter(said).items():
        added[token] += -params.presence_penalty - params.frequency_penalty * count
    never = [way[-1] for way in BAD if len(way) == 1 or tuple(text[1 - len(way) :]) == way[:-1]]
    never += ENDS if len(said) < params.min_new_tokens else ()
    return {token: value for token, value in (dict(added) | dict.fromkeys(never, NEVER)).items() if value}


@settings(max_examples=200)
@given(chosen, tokens, tokens, st.lists(st.integers(1, 4), max_size=6), st.integers(0, 11))
def test_what_is_kept_up_is_what_a_look_at_everything_says(chosen, prompt, said, pieces, fork):
    params = SamplingParams(**chosen)
    past, text = Past(Rules.of(params, len(prompt), ENDS, BAD)), list(prompt)
    for token in [None, *said]:
        text += [] if token is None else [token]
        if len(text) - len(prompt) == fork:
            other, past = past, past.fork()
            other.read([*text, 1])  # what a fork says does not matter to the others
        past.read(text)
        past.read(text)  # as when it is preempted and computed again
        found = {key: value for key, value in past.added(text).items() if value}
        assert found == looked_up(params, prompt, text[len(prompt) :])
        assert set(past.seen) == (set(text) if params.repetition_penalty != 1.0 else set())
