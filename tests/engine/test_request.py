"""What may be asked."""

from __future__ import annotations

import pytest

from mindgen.engine.request import Request, SamplingParams, derive_seed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"stop": "end"}, "stop is 'end'"),
        ({"stop": ("",)}, "stop is ('',)"),
        ({"stop_token_ids": (-5,)}, "stop token id is -5"),
        ({"n": 0}, "n is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "n": 3}, "n is 3"),
        ({"num_beams": 2, "stop": ("x",)}, "stop strings"),
        ({"num_beams": 2, "logprobs": 1}, "log-probabilities"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"length_penalty": 99.0}, "length_penalty is 99.0"),
    ],
)
def test_a_value_out_of_range_is_named(options, named):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**options)
    assert named in str(caught.value)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt of request 7 is empty"):
        Request(7, ())


def test_seeds_of_samples_differ_and_the_first_is_the_seed_itself():
    for seed in (0, 1, 2**64 - 1):
        seeds = [derive_seed(seed, index) for index in range(1000)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 1000 and all(0 <= other < 2**64 for other in seeds)
