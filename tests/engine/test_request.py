"""What may be asked."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch

from mindgen.engine.request import Request, SamplingParams, derive_seed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": numpy.bool_(True)}, f"max_new_tokens is {numpy.bool_(True)!r}"),
        ({"max_new_tokens": torch.tensor(True)}, "max_new_tokens is tensor(True)"),
        ({"max_new_tokens": numpy.array([1, 2])}, "max_new_tokens is array([1, 2])"),
        ({"max_new_tokens": torch.tensor(2.5)}, "max_new_tokens is tensor(2.5000)"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 (greedy) or a number from 1e-05 up"),
        ({"temperature": 1e-6}, "temperature is 1e-06; it must be 0 (greedy) or a number from 1e-05 up"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": numpy.float32("nan")}, f"temperature is {numpy.float32('nan')!r}"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be a number from 1e-05 to 100000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": ("",)}, "stop is ('',)"),
        ({"bad_words": ["x", 3]}, "bad_words is ['x', 3]"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5"),
        ({"stop": ["a", "\ud800"]}, "stop is ['a', '\\ud800']: the text has a lone surrogate"),
        ({"bad_words": "a\udfff"}, "bad_words is 'a\\udfff': the text has a lone surrogate"),
        ({"stop_token_ids": (-5,)}, "stop token id is -5"),
        ({"n": 0}, "n is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "n": 3}, "n is 3"),
        ({"num_beams": 2, "stop": ("x",)}, "stop strings"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs is 1, but a beam search reports no log-probabilities"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"length_penalty": 99.0}, "length_penalty is 99.0"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; it must be a whole number from 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, above max_new_tokens"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be a number from 0 to 1"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; it must be a number from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"best_of": 0}, "best_of is 0"),
        ({"best_of": 257}, "best_of is 257; it must be a whole number from 1 to 256"),
        ({"best_of": 2, "n": 3}, "best_of is 2, but n is 3"),
        ({"best_of": 2, "temperature": 0.0}, "temperature 0"),
        ({"best_of": 2, "num_beams": 2}, "best_of is 2, but beams"),
        ({"prompt_logprobs": 1001}, "prompt_logprobs is 1001; it must be a whole number from 0 to 1000"),
        ({"prompt_logprobs": 0, "num_beams": 2}, "prompt_logprobs is 0, but a beam search reports no"),
        ({"echo": 1}, "echo is 1"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 is 101; it must be a number from -100 to 100"),
        ({"logit_bias": {-3: 1}}, "token id of logit_bias is -3"),
        ({"logit_bias": {"a": 1}}, "token id of logit_bias is 'a'"),
        ({"logit_bias": 7}, "logit_bias is 7"),
        ({"logit_bias": [1, 2]}, "logit_bias is [1, 2]"),
    ],
)
def test_a_value_out_of_range_is_named(options, named):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**options)
    assert named in str(caught.value)


def test_the_ends_of_a_range_are_in_it():
    assert SamplingParams(temperature=1e-5, repetition_penalty=1e-5).temperature == 1e-5
    assert SamplingParams(temperature=0, repetition_penalty=100000).repetition_penalty == 1e5


def test_numbers_of_any_type_are_kept_as_pythons_own():
    params = SamplingParams(
        max_new_tokens=numpy.int64(3),
        seed=numpy.uint64(2**64 - 1),
        best_of=numpy.int8(2),
        top_k=torch.tensor(3),
        temperature=numpy.float32(0.5),
        top_p=1,
        stop_token_ids=[numpy.int32(4)],
        logit_bias={numpy.int64(3): numpy.float64(1)},
    )
    counts, filters = ("max_new_tokens", "seed", "best_of", "top_k"), ("temperature", "top_p", "min_p")
    assert [getattr(params, name) for name in (*counts, *filters)] == [3, 2**64 - 1, 2, 3, 0.5, 1.0, 0.0]
    assert {type(getattr(params, name)) for name in counts} == {int}
    assert {type(getattr(params, name)) for name in filters} == {float}
    assert repr(params.stop_token_ids + params.logit_bias) == "(4, (3, 1.0))"


def test_lists_and_dicts_are_kept_so_that_parameters_can_be_hashed_and_replaced():
    params = SamplingParams(stop=["x", "y"], stop_token_ids=[4, 2], bad_words="z", logit_bias={9: 1, 3: -2.5})
    same = SamplingParams(stop=("x", "y"), stop_token_ids=(4, 2), bad_words=("z",), logit_bias={3: -2.5, 9: 1.0})
    assert params == same and len({params, same, replace(params), replace(same, n=1)}) == 1
    assert (params.stop, params.bad_words, params.logit_bias) == (("x", "y"), ("z",), ((3, -2.5), (9, 1)))
    assert SamplingParams(stop="end").stop == ("end",)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt of request 7 is empty"):
        Request(7, ())


def test_seeds_of_samples_differ_and_the_first_is_the_seed_itself():
    for seed in (0, 1, 2**64 - 1):
        seeds = [derive_seed(seed, index) for index in range(1000)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 1000 and all(0 <= other < 2**64 for other in seeds)
