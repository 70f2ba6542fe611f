"""What a request may ask, judged by transformers' generate and its processors on a tiny Llama."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mindgen.engine.request import Output, Request, SamplingParams
from mindgen.engine.transcript import TextTools
from mindgen.text.stream import StopMatcher
from tests.engine.fakes import Letters, make_engine, run, token_ids
from tests.engine.llama import VOCAB, last_logits, tiny_llama
from tests.engine.test_sampler import chi_square

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)
PROMPTS = [tuple(torch.randint(VOCAB, (3 + 4 * k,), generator=torch.Generator().manual_seed(k)).tolist())
           for k in range(4)]  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def logits(llama):
    return partial(last_logits, llama)


def theirs(llama: Any, prompt: tuple[int, ...], **options: Any) -> tuple[int, ...]:
    """The greedy answer of transformers."""
    found = llama.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens, pad_token_id=VOCAB - 1, **options,
    )  # fmt: skip
    return tuple(found[0, len(prompt) :].tolist())


@torch.inference_mode()
def their_logprobs(llama: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """Row i: log-probabilities of what follows the first i + 1 tokens."""
    logprobs: torch.Tensor = llama(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs


def ours(logits: Any, prompt: tuple[int, ...], params: SamplingParams, **options: Any) -> tuple[int, ...]:
    return token_ids(run(make_engine(logits, **options), Request(0, prompt, params)))[0, 0]


# Tokens that must not come


def test_no_end_token_comes_before_min_new_tokens(llama, logits):
    early = 0
    for prompt in PROMPTS:
        eos = list(dict.fromkeys(ours(logits, prompt, GREEDY)[:6:2]))
        wanted = theirs(llama, prompt, eos_token_id=eos, min_new_tokens=7)
        assert ours(logits, prompt, replace(GREEDY, min_new_tokens=7), eos_ids=eos) == wanted
        stops = replace(GREEDY, min_new_tokens=7, stop_token_ids=eos)
        assert ours(logits, prompt, stops) == wanted
        early += len(ours(logits, prompt, GREEDY, eos_ids=eos)) < 7
    assert early == len(PROMPTS), "nothing would have ended early"


def tokenizer(**words: list[int]) -> TextTools:
    """Writes some words; the ids after a line break are the same."""
    return TextTools(Letters, StopMatcher, lambda text: words.get(text.strip("\n").replace(" ", "_"), []))


def test_bad_words_are_those_of_transformers(llama, logits):
    for prompt in PROMPTS:
        said = ours(logits, prompt, GREEDY)
        one, many, crossing = [said[4]], list(said[1:4]), [prompt[-1], said[0]]
        tools = tokenizer(a=one, _a=[7, 7, 7], b=many, _b=crossing)
        wanted = theirs(llama, prompt, bad_words_ids=[one, [7, 7, 7], many, crossing])
        found = ours(logits, prompt, replace(GREEDY, bad_words=["a", "b"]), tools=tools)
        assert found == wanted != said
        assert one[0] not in found and found[0] != said[0]


def test_a_logit_bias_is_the_bias_of_transformers(llama, logits):
    for prompt in PROMPTS:
        said = ours(logits, prompt, GREEDY)
        bias = {said[0]: -1.5, said[3]: -100.0, 9: 2.25}
        wanted = theirs(llama, prompt, sequence_bias=[[[token], value] for token, value in bias.items()])
        assert ours(logits, prompt, replace(GREEDY, logit_bias=bias)) == wanted != said


def test_everything_together_is_as_in_transformers(llama, logits):
    for prompt in PROMPTS:
        said = ours(logits, prompt, replace(GREEDY, repetition_penalty=1.4))
        bad, eos = [list(said[2:4]), [said[6]]], [said[1]]
        params = replace(GREEDY, repetition_penalty=1.4, min_new_tokens=5, bad_words=("a",))
        tools = tokenizer(a=bad[0], _a=bad[1])
        wanted = theirs(llama, prompt, repetition_penalty=1.4, min_new_tokens=5, bad_words_ids=bad, eos_token_id=eos)
        assert ours(logits, prompt, params, tools=tools, eos_ids=eos) == wanted


# Log-probabilities


def check_logprobs(llama: Any, tokens: tuple[int, ...], found: Any, num_top: int) -> None:
    """`found` belongs to the last tokens of `tokens`."""
    start = len(tokens) - len(found)
    table = their_logprobs(llama, tokens)
    assert [one.token_id for one in found] == list(tokens[start:])
    for place, one in enumerate(found, start):
        if place == 0:
            assert one.logprob is None and one.top == ()
            continue
        assert one.logprob == pytest.approx(float(table[place - 1, tokens[place]]), abs=1e-4)
        values, ids = table[place - 1].topk(num_top)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


def gathered(outputs: list[Output], index: int) -> list[Any]:
    return [one for output in outputs if output.index == index for one in output.logprobs or ()]


def test_log_probabilities_of_every_sample_are_those_of_transformers(llama, logits):
    params = SamplingParams(max_new_tokens=9, seed=5, n=3, logprobs=4, top_k=20, temperature=1.3, presence_penalty=1.0)
    outputs = run(make_engine(logits), Request(0, PROMPTS[1], params))
    for (_, index), tokens in token_ids(outputs).items():
        check_logprobs(llama, PROMPTS[1] + tokens, gathered(outputs, index), 4)


@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 4}, {"cache": False}, {"num_stages": 3, "block_size": 3}])
def test_prompt_log_probabilities_are_those_of_transformers(llama, logits, limits):
    params = [
        SamplingParams(max_new_tokens=3, seed=5, n=2, prompt_logprobs=number, logprobs=number and 1)
        for number in (3, 0, 1, 2)
    ]
    requests = [Request(number, prompt, one) for number, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True))]
    outputs = run(make_engine(logits, **limits), *requests)
    for request in requests:
        for index in range(2):
            pieces = [output for output in outputs if (output.request_id, output.index) == (request.id, index)]
            assert [piece.prompt_logprobs is None for piece in pieces] == [False, True, True]
            found = pieces[0].prompt_logprobs
            assert len(found) == len(request.prompt)
            check_logprobs(llama, request.prompt, found, request.params.prompt_logprobs)


def test_prompt_log_probabilities_are_computed_for_a_prompt_that_the_cache_knows(llama, logits):
    params = SamplingParams(max_new_tokens=2, temperature=0.0)
    engine = make_engine(logits, block_size=2)
    run(engine, Request(0, PROMPTS[3], params))
    outputs = run(engine, Request(1, PROMPTS[3], replace(params, prompt_logprobs=2)))
    assert engine.scheduler.stats.num_reused_tokens == 0
    check_logprobs(llama, PROMPTS[3], outputs[0].prompt_logprobs, 2)
    run(engine, Request(2, PROMPTS[3], params))
    assert engine.scheduler.stats.num_reused_tokens, "the cache knew nothing"


def test_an_echo_has_the_prompt_and_its_log_probabilities(llama, logits):
    params = SamplingParams(max_new_tokens=4, seed=2, echo=True, logprobs=2, n=2)
    outputs = run(make_engine(logits, max_batch_tokens=5), Request(0, PROMPTS[2], params))
    plain = token_ids(run(make_engine(logits), Request(0, PROMPTS[2], replace(params, echo=False))))
    for key, tokens in token_ids(outputs).items():
        assert tokens == PROMPTS[2] + plain[key]
        check_logprobs(llama, tokens, gathered(outputs, key[1]), 2)


# The best of many


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_best_of_many_samples_are_those_that_transformers_ranks_first(llama, logits, n):
    params = SamplingParams(max_new_tokens=8, seed=9, n=6, temperature=1.2)
    prompt, eos = PROMPTS[1], range(0, VOCAB, 5)
    drawn = [
        tokens
        for _, tokens in sorted(token_ids(run(make_engine(logits, eos_ids=eos), Request(0, prompt, params))).items())
    ]

    def total(tokens: tuple[int, ...]) -> float:
        table = their_logprobs(llama, prompt + tokens)[len(prompt) - 1 :]
        return float(sum(table[place, token] for place, token in enumerate(tokens)))

    outputs = run(make_engine(logits, eos_ids=eos), Request(0, prompt, replace(params, n=n, best_of=6)))
    ranked = sorted(drawn, key=total, reverse=True)
    assert len({len(tokens) for tokens in drawn}) > 1 and ranked != drawn
    assert [output.token_ids for output in outputs] == ranked[:n]
    assert [output.index for output in outputs] == list(range(n))
    assert [output.score for output in outputs] == pytest.approx([total(tokens) for tokens in ranked[:n]], abs=1e-3)
    assert all(output.finish_reason in ("eos", "length") for output in outputs)


def test_samples_follow_the_distribution_of_transformers(llama, logits):
    """First tokens of many samples, with every filter."""
    from transformers.generation import logits_process as hf

    params = SamplingParams(max_new_tokens=1, temperature=1.6, top_k=30, top_p=0.9, min_p=0.02, n=250)
    scores = logits([list(PROMPTS[0])])
    for warper in (hf.TemperatureLogitsWarper(1.6), hf.TopKLogitsWarper(30), hf.TopPLogitsWarper(0.9),
                   hf.MinPLogitsWarper(0.02)):  # fmt: skip
        scores = warper(None, scores)
    kept = scores.softmax(-1)[0].double()
    requests = [Request(seed, PROMPTS[0], replace(params, seed=seed)) for seed in range(20)]
    answers = token_ids(run(make_engine(logits, num_blocks=4000, max_sequences=256), *requests))
    counts = torch.tensor([token for (token,) in answers.values()]).bincount(minlength=VOCAB).double()
    assert counts.sum() == 5000 and not counts[kept == 0].any() and (kept == 0).any()
    assert chi_square(counts[kept > 0], kept[kept > 0]) < 1
