"""Beam search, judged by transformers' generate on a tiny Llama."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch

from mindgen.engine.request import Request, SamplingParams
from tests.engine.fakes import LETTERS, make_engine, run
from tests.engine.llama import VOCAB, last_logits, tiny_llama
from tests.engine.test_sampler import chi_square


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def logits(llama):
    return partial(last_logits, llama)


def theirs(llama, prompt, params, eos_ids):
    """Sequences without their padding, and scores."""
    biases = [[[token], value] for token, value in params.logit_bias] or None
    found = llama.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        num_beams=params.num_beams, num_return_sequences=params.n, max_new_tokens=params.max_new_tokens,
        length_penalty=params.length_penalty, repetition_penalty=params.repetition_penalty, early_stopping=False,
        min_new_tokens=params.min_new_tokens or None, sequence_bias=biases, eos_token_id=list(eos_ids) or None,
        pad_token_id=VOCAB - 1, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    sequences = [trim(row[len(prompt) :], eos_ids) for row in found.sequences.tolist()]
    return sequences, found.sequences_scores.tolist()


def trim(tokens, eos_ids):
    end = next((index + 1 for index, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tuple(tokens[:end])


CASES = {
    "two beams": (SamplingParams(num_beams=2, n=2), ()),
    "four beams": (SamplingParams(num_beams=4, n=4), ()),
    "one end token": (SamplingParams(num_beams=2, n=2), range(4)),
    "many end tokens": (SamplingParams(num_beams=4, n=3), (1, 5, 7, 11, 20, 33, 40)),
    "three beams, end tokens": (SamplingParams(num_beams=3, n=3), (2, 3, 9, 12)),
    "repetition penalty": (SamplingParams(num_beams=4, n=4, repetition_penalty=1.7), (1, 5, 7, 11)),
    "repetition reward": (SamplingParams(num_beams=2, n=1, repetition_penalty=0.6), range(20)),
    "long is good": (SamplingParams(num_beams=4, n=4, length_penalty=1.6), range(0, 60, 2)),
    "short is good": (SamplingParams(num_beams=4, n=2, length_penalty=-1.0), (1, 5, 7, 11, 20)),
    "no length penalty": (SamplingParams(num_beams=2, n=2, length_penalty=0.0), (1, 5, 7)),
    "at least six tokens": (SamplingParams(num_beams=3, n=3, min_new_tokens=6), range(4)),
    "biases": (SamplingParams(num_beams=3, n=3, logit_bias={5: 3.0, 9: -2.0, 20: -100.0}), (1, 5, 7)),
    "one token": (SamplingParams(num_beams=4, n=4, max_new_tokens=1), (1, 5, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_beams_are_those_of_transformers(llama, logits, name):
    params, eos_ids = CASES[name]
    params = replace(params, temperature=0.0, max_new_tokens=min(params.max_new_tokens, 12))
    lengths = set()
    for number in range(4):
        prompt = torch.randint(VOCAB, (2 + 3 * number,), generator=torch.Generator().manual_seed(number)).tolist()
        engine = make_engine(logits, block_size=4, eos_ids=eos_ids)
        outputs = run(engine, Request(0, tuple(prompt), params))
        sequences, scores = theirs(llama, prompt, params, eos_ids)
        assert [output.token_ids for output in outputs] == sequences
        assert [output.score for output in outputs] == pytest.approx(scores, rel=1e-4, abs=1e-5)
        lengths |= {len(sequence) for sequence in sequences}
        assert {output.finish_reason for output in outputs} <= {"eos", "length"}
    assert len(lengths) > 1 or not eos_ids or params.max_new_tokens == 1, "the case never ends a beam early"


def by_hand(table: list[list[float]]) -> Iterator[tuple[tuple[int, int], float]]:
    """Every course of a sampled search with two beams and two tokens: the best answer and the probability.

    table[t][u] is the (tempered) log-probability of u after t; the prompt is token 0. The first step draws 4 tokens
    without replacement and goes on with the best 2 of them; of the second step's draws the first 2 are answers.
    """
    for draws, first in ordered(dict(enumerate(table[0])), 4):
        kept = sorted(draws, key=lambda token: -table[0][token])[:2]
        scores = {(one, two): table[0][one] + table[one][two] for one in kept for two in range(len(table))}
        for answers, second in ordered(scores, 2):
            yield max(answers, key=scores.__getitem__), first * second


def ordered(scores: dict, count: int) -> Iterator[tuple[tuple, float]]:
    """Ordered draws without replacement, with their probabilities, in proportion to exp(score)."""
    weights = {key: math.exp(score) for key, score in scores.items()}
    for draws in permutations(weights, count):
        left, probability = sum(weights.values()), 1.0
        for key in draws:
            probability *= weights[key] / left
            left -= weights[key]
        yield draws, probability


def test_sampled_beams_are_drawn_without_replacement():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(8))
    probabilities: Counter[tuple[int, int]] = Counter()
    for answer, probability in by_hand((table.log_softmax(1) / 0.7).tolist()):
        probabilities[answer] += probability
    params = [SamplingParams(num_beams=2, max_new_tokens=2, temperature=0.7, seed=seed) for seed in range(3000)]
    engine = make_engine(lambda contexts: table[[context[-1] for context in contexts]], cache=False,
                         max_batch_tokens=10**5, max_sequences=10**5)  # fmt: skip
    outputs = run(engine, *(Request(number, (0,), one) for number, one in enumerate(params)))
    counts = Counter(output.token_ids for output in outputs)
    assert sum(probabilities.values()) == pytest.approx(1)
    likely = [answer for answer, probability in probabilities.items() if probability > 0.002]
    observed = [counts[answer] for answer in likely]
    wanted = [probabilities[answer] for answer in likely]
    observed, wanted = [*observed, len(params) - sum(observed)], [*wanted, 1 - sum(wanted)]
    assert chi_square(torch.tensor(observed).double(), torch.tensor(wanted).double()) < 1


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.01}])
def test_filters_of_sampled_beams_leave_more_tokens_than_there_are_end_tokens(narrow):
    """Else a search with top_k=1 could only end."""
    logits = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    engine = make_engine(lambda contexts: logits.expand(len(contexts), -1), eos_ids=(0, 1))
    params = SamplingParams(num_beams=2, n=2, max_new_tokens=9, seed=5, **narrow)
    outputs = run(engine, Request(0, (3,), params))
    assert {token for output in outputs for token in output.token_ids} <= {0, 1, 2}
    assert [output.finish_reason for output in outputs] == ["eos", "eos"]


def test_the_text_of_a_beam_has_no_end_token():
    params = SamplingParams(num_beams=2, n=2, temperature=0.0, max_new_tokens=3, stop_token_ids=(1,))
    logits = torch.tensor([1.0, 2.0, 3.0])
    outputs = run(
        make_engine(lambda contexts: logits.expand(len(contexts), -1), tools=LETTERS), Request(0, (2,), params)
    )
    assert {(output.token_ids, output.text, output.finish_reason) for output in outputs} == {
        ((2, 2, 1), "cc", "stop"),
        ((2, 2, 2), "ccc", "length"),
    }
