"""Draws from the whole vocabulary that sort nothing are the draws of the plain formula."""

from __future__ import annotations

import pytest
import torch

from mindgen.engine.noise import arrival_times, gumbel_noise
from mindgen.engine.request import SamplingParams
from tests.engine.test_sampler import tokens


def plainly_drawn(logits: torch.Tensor, params: SamplingParams) -> int:
    """Sort everything, filter, add the noise of every token, and take the largest."""
    scores = (logits / params.temperature).double()
    order = sorted(range(len(logits)), key=lambda token: (-float(scores[token]), token))
    weights = (scores - scores.max()).exp()
    before, kept = 0.0, []
    for token in order:
        if (not kept or before < params.top_p * float(weights.sum())) and weights[token] >= params.min_p:
            kept.append(token)
        before += float(weights[token])
    noise = gumbel_noise(torch.tensor([params.seed]), torch.tensor([1]), torch.arange(len(logits))[None])[0]
    return max(kept, key=lambda token: float(scores[token] + noise[token]))


@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_p": 0.1}, {"min_p": 0.1}, {"top_p": 0.6, "min_p": 0.4}])
def test_a_race_is_won_by_the_token_of_the_plain_formula(spread, options):
    logits = (torch.randn(30, 700, generator=torch.Generator().manual_seed(2)) * spread).bfloat16().float()
    asked = [SamplingParams(seed=seed, temperature=(1.0, 0.6)[seed % 2], **options) for seed in range(30)]
    wanted = [plainly_drawn(row, params) for row, params in zip(logits, asked, strict=True)]
    assert tokens(logits, *((params, (0,)) for params in asked)) == wanted


def test_a_race_over_a_large_vocabulary_is_won_by_the_largest_key():
    """Flat, peaked, with one token far ahead, and with tokens so improbable that float32 cannot hold them."""
    logits = torch.randn(120, 9000, generator=torch.Generator().manual_seed(6))
    logits *= torch.tensor([0.0, 1.0, 5.0, 100.0]).repeat(30)[:, None]
    logits[::5, 77] += 14.0
    drawn = tokens(logits, *((SamplingParams(seed=seed), (0,)) for seed in range(120)))
    assert drawn == (logits + noise_of(120, 9000)).argmax(dim=1).tolist()


def noise_of(seeds: int, vocab: int) -> torch.Tensor:
    """The noise of seeds 0, 1, ... at position 1."""
    ids = torch.arange(vocab).expand(seeds, -1)
    return gumbel_noise(torch.arange(seeds), torch.ones(seeds, dtype=torch.int64), ids)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_a_race_that_rounding_would_decide_is_decided_exactly(options):
    """Scores that cancel the noise, so that all tokens arrive together."""
    noise = noise_of(30, 200)
    logits = -noise.float()
    asked = [SamplingParams(seed=seed, **options) for seed in range(30)]
    wanted = [plainly_drawn(row, params) for row, params in zip(logits, asked, strict=True)]
    assert tokens(logits, *((params, (0,)) for params in asked)) == wanted
    assert (logits + noise).abs().max() < 1e-5


def test_times_of_a_race_are_the_noise_of_its_tokens():
    seeds, positions = torch.tensor([-1, 0, 2**62]), torch.tensor([0, 5, 9])
    times = arrival_times(seeds, positions, 100_000).double()
    exact = (-gumbel_noise(seeds, positions, torch.arange(100_000).expand(3, -1))).exp()
    late = exact > 6.9
    assert ((times / exact - 1).abs() < 2e-5)[~late].all()
    assert ((times <= exact * 1.00002) & (times > 6.8))[late].all() and late.any()
