"""The sampler: exact distributions, the filters of transformers, and rows that ignore each other."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from mindgen.engine.batch import Batch, SampleRows, ScoredRows, make_batch
from mindgen.engine.noise import gumbel_noise
from mindgen.engine.request import Request, SamplingParams, Sequence
from mindgen.engine.results import Sampled, read_row
from mindgen.engine.sampler import sample, score
from mindgen.engine.scheduler import Chunk, Step

GREEDY = SamplingParams(temperature=0.0)


def rows_of(*asked: tuple[SamplingParams, tuple[int, ...]]) -> SampleRows:
    """One row for each (params, tokens so far)."""
    chunks = []
    for number, (params, tokens) in enumerate(asked):
        sequence = Sequence.start(Request(number, tokens, params), params.seed or 0)
        chunks.append(Chunk(sequence, 0, len(tokens), 1))
    return Batch.unpack(make_batch(Step(tuple(chunks)), None).pack()).samples


def sampled(logits: torch.Tensor, *asked: tuple[SamplingParams, tuple[int, ...]]) -> list[Sampled]:
    results = sample(logits, rows_of(*asked))
    return [read_row(row, params.logprobs or 0) for row, (params, _) in zip(results.tolist(), asked, strict=True)]


def tokens(logits: torch.Tensor, *asked: tuple[SamplingParams, tuple[int, ...]]) -> list[int | None]:
    return [row.token for row in sampled(logits, *asked)]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The statistic over its bound: above 1 happens once in a million."""
    expected = probabilities * counts.sum()
    degrees = len(counts) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 4.76 * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson and Hilferty
    return float(((counts - expected) ** 2 / expected).sum()) / bound


def many(
    logits: torch.Tensor,
    params: SamplingParams,
    draws: int,
    by: str = "seed",
    seen: tuple[int, ...] = (0,),
    rows: SampleRows | None = None,
) -> torch.Tensor:
    """Tokens of one row [1, V] drawn again and again, for other seeds or at other positions."""
    one = rows or rows_of((params, seen))
    columns = {item.name: getattr(one, item.name).repeat(draws) for item in fields(one)}
    for name, ids in (("seen_row", one.seen), ("added_row", one.added_id)):
        columns[name] = torch.arange(draws).repeat_interleave(len(ids))
    columns[by] = torch.arange(draws)
    return sample(logits.expand(draws, -1), SampleRows(**columns))[:, 0].long()


@pytest.mark.parametrize("by", ["seed", "position"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_follow_the_softmax(by, temperature):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5, 0.5, -2.0]])
    drawn = many(logits, SamplingParams(temperature=temperature), 20_000, by)
    probabilities = (logits[0].double() / temperature).softmax(0)
    assert chi_square(drawn.bincount(minlength=7).double(), probabilities) < 1


def test_draws_at_neighbouring_positions_and_seeds_are_independent():
    logits = torch.zeros(1, 6)
    for by in ("seed", "position"):
        drawn = many(logits, SamplingParams(), 30_001, by)
        pairs = (drawn[:-1] * 6 + drawn[1:]).bincount(minlength=36).double()
        assert chi_square(pairs, torch.full((36,), 1 / 36)) < 1


def test_noise_is_standard_gumbel_and_finite():
    noise = gumbel_noise(torch.tensor([-1, 0, 2**62]), torch.tensor([0, 5, 9]), torch.arange(100_000).expand(3, -1))
    assert noise.isfinite().all()
    assert noise.mean(dim=1).tolist() == pytest.approx([0.5772] * 3, abs=0.02)
    assert noise.var(dim=1).tolist() == pytest.approx([math.pi**2 / 6] * 3, abs=0.05)
    assert len(noise.flatten().unique()) == noise.numel()


def plain_noise(seed: int, position: int, token: int) -> float:
    """The same noise in whole numbers that do not wrap around by themselves."""
    golden, size = 0x9E3779B97F4A7C15, 1 << 64

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % size
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % size
        return state ^ (state >> 31)

    start = mix((mix((seed + golden) % size) + (position + 1) * golden) % size)
    bits = mix((start + (token + 1) * golden) % size)
    return -math.log(-math.log(((bits >> 12) + 0.5) / (1 << 52)))


def test_noise_is_the_same_everywhere_and_in_every_release():
    noise = gumbel_noise(torch.tensor([42, 3 - 2**63]), torch.tensor([7, 8]), torch.tensor([[0, 1, 31999]] * 2))
    for row, (seed, position) in zip(noise.tolist(), [(42, 7), (3 + 2**63, 8)], strict=True):
        assert row == pytest.approx([plain_noise(seed, position, token) for token in (0, 1, 31999)], abs=1e-12)
    assert noise[0].tolist() == pytest.approx([-1.5753393218783878, -0.863865850409436, 1.3730440416176686], abs=1e-12)


def test_a_token_has_the_same_noise_whatever_is_filtered():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 3
    asked = [(SamplingParams(seed=seed), (1, 2)) for seed in range(40)]
    drawn = torch.tensor(tokens(logits, *asked))
    chosen = logits.gather(1, drawn[:, None])
    rank = (logits > chosen).sum(1) + 1
    again = [(SamplingParams(seed=seed, top_k=int(k)), (1, 2)) for seed, k in enumerate(rank)]
    assert tokens(logits, *again) == drawn.tolist()


def test_zero_temperature_takes_the_first_largest_logit():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [9.0, 1.0, 2.0, 3.0]])
    assert tokens(logits, (GREEDY, (0,)), (GREEDY, (0,))) == [1, 0]


def survivors(logits: torch.Tensor, params: SamplingParams, seen: tuple[int, ...] = (0,)) -> set[int]:
    """The tokens that come up in many draws."""
    return set(many(logits, params, 1500, seen=seen).tolist())


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"top_k": 3}, (0,)),
        ({"top_k": 1}, (0,)),
        ({"top_k": 99}, (0,)),
        ({"top_p": 0.5}, (0,)),
        ({"top_p": 0.0}, (0,)),
        ({"top_p": 0.999}, (0,)),
        ({"top_k": 5, "top_p": 0.6}, (0,)),
        ({"top_k": 5, "top_p": 0.7, "temperature": 3.0}, (0,)),
        ({"top_k": 4, "repetition_penalty": 1.5}, (2, 5, 5, 9)),
        ({"top_p": 0.6, "repetition_penalty": 0.5, "temperature": 0.7}, (1, 0, 99)),
        ({"min_p": 0.2}, (0,)),
        ({"min_p": 1.0}, (0,)),
        ({"min_p": 0.3, "top_p": 0.8, "temperature": 1.5}, (0,)),
        ({"min_p": 0.3, "top_k": 6, "temperature": 2.0, "repetition_penalty": 1.3}, (3, 4)),
    ],
)
def test_the_filters_are_those_of_transformers(options, seen):
    from transformers.generation import logits_process as hf

    params = SamplingParams(**options)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(len(options)))
    known = torch.tensor([[token for token in seen if token < 12]])  # of others it says nothing, or fails
    scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(known, logits.clone())
    scores = hf.TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(None, scores)
    kept = scores.softmax(-1)[0]
    drawn = many(logits, params, 4000, seen=seen)
    counts = drawn.bincount(minlength=12).double()
    assert not counts[kept == 0].any()
    if (kept > 0).sum() > 1:
        assert chi_square(counts[kept > 0], kept[kept > 0].double()) < 1


def test_top_k_keeps_ties():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    assert survivors(logits, SamplingParams(top_k=2)) == {0, 1, 2, 3}


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert survivors(logits, SamplingParams(top_p=0.5)) == {0, 1}
    assert survivors(logits, SamplingParams(top_p=0.39)) == {0}
    assert survivors(logits, SamplingParams(top_p=0.71)) == {0, 1, 2}


@pytest.mark.parametrize("top_k", [0, 4])
def test_min_p_keeps_what_has_exactly_its_share(top_k):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert survivors(logits, SamplingParams(min_p=1.0, top_k=top_k)) == {1, 2}


def test_greedy_sees_the_repetition_penalty_and_the_reported_logprob_does_not():
    logits = torch.tensor([[2.0, 1.9, -1.0], [-2.0, -1.9, -3.0]])
    params = SamplingParams(temperature=0.0, repetition_penalty=1.2, logprobs=2)
    first, second = sampled(logits, (params, (0,)), (params, (1, 1)))
    assert (first.token, second.token) == (1, 0)
    assert first.logprob == pytest.approx(float(logits[0].log_softmax(0)[1]))
    assert [candidate.token for candidate in first.top] == [0, 1]
    assert [c.logprob for c in second.top] == pytest.approx(logits[1].log_softmax(0)[[1, 0]].tolist())


def test_alternatives_beyond_the_vocabulary_do_not_exist():
    (row,) = sampled(torch.tensor([[0.0, 1.0]]), (SamplingParams(logprobs=5), (0,)))
    assert [candidate.token for candidate in row.top] == [1, 0]


def test_presence_and_frequency_take_from_the_scores_of_generated_tokens():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={0: 3.0, 4: -1.0}, n=1)
    sequence = Sequence.start(Request(0, (0, 1, 1), params), 0)
    sequence.tokens += [1, 3, 3, 4, 3, 9]  # 9 is outside the vocabulary
    batch = make_batch(Step((Chunk(sequence, 0, 9, 1),)), None)
    expected = [1.0 + 3.0, 2.0 - 0.75, 3.0, 4.0 - 0.5 - 3 * 0.25, 5.0 - 1.0 - 0.75]
    counts = many(logits, params, 20_000, rows=batch.samples).bincount(minlength=5).double()
    assert chi_square(counts, torch.tensor(expected).double().softmax(0)) < 1


def test_additions_come_after_the_repetition_penalty_and_what_is_forbidden_stays_so():
    logits = torch.tensor([[4.0, 3.0, 2.5, 0.0]])
    biased = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={0: 0.9})
    assert tokens(logits, (biased, (0,))) == [1]  # 4 / 2 + 0.9 < 3; (4 + 0.9) / 2 < 3 as well
    assert tokens(logits, (replace(biased, logit_bias={0: 1.1}), (0,))) == [0]
    sequence = Sequence.start(Request(0, (0,), replace(biased, logit_bias={0: 100.0})), 0, bad_words=[(0,), (1,)])
    batch = make_batch(Step((Chunk(sequence, 0, 1, 1),)), None)
    assert sample(logits, batch.samples)[0, 0] == 2


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"num_beams": 2}])
def test_where_everything_is_forbidden_there_is_no_token(options):
    sequence = Sequence.start(Request(0, (0,), SamplingParams(**options)), 0, bad_words=[(0,), (1,)])
    batch = make_batch(Step((Chunk(sequence, 0, 1, 1),)), None)
    assert read_row(sample(torch.zeros(1, 2), batch.samples)[0].tolist(), 0).token is None


def test_a_log_probability_is_told_only_where_it_is_wanted():
    logits = torch.randn(3, 9)
    asked = [SamplingParams(), SamplingParams(logprobs=0), SamplingParams(best_of=2)]
    found = sampled(logits, *((params, (0,)) for params in asked))
    assert [row.logprob is None for row in found] == [True, False, False]


def test_known_tokens_are_scored_in_rows_of_their_own():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    logits[3, 5] = math.nan
    rows = ScoredRows(torch.arange(4), torch.tensor([8, 0, 3, 3]), torch.tensor([0, 2, 12, 1]))
    assert [len(part) for part in rows.split(3)] == [3, 1]
    found = [read_row(row, number) for row, number in zip(score(logits, rows).tolist(), (0, 2, 12, 1), strict=True)]
    table = logits.log_softmax(-1)
    for number, (row, token) in enumerate(zip(found[:3], (8, 0, 3), strict=True)):
        assert row.token == token and row.logprob == pytest.approx(float(table[number, token]))
    assert [candidate.token for candidate in found[1].top] == table[1].topk(2).indices.tolist()
    assert len(found[2].top) == 9 and found[3].token is None


def mixed_rows() -> list[tuple[SamplingParams, tuple[int, ...]]]:
    options: list[dict[str, float | int]] = [
        {}, {"temperature": 0.0}, {"top_k": 4}, {"top_k": 30, "top_p": 0.8}, {"top_p": 0.7}, {"temperature": 0.3},
        {"temperature": 0.0, "repetition_penalty": 1.4}, {"top_p": 0.9, "repetition_penalty": 1.4, "logprobs": 3},
        {"num_beams": 2, "temperature": 0.0}, {"num_beams": 3, "top_k": 7}, {"logprobs": 0}, {"top_k": 1},
        {"min_p": 0.1}, {"min_p": 0.1, "top_p": 0.8, "top_k": 20}, {"num_beams": 2, "top_p": 0.9, "min_p": 0.01},
        {"logit_bias": {3: 5.0}}, {"temperature": 0.0, "logit_bias": {8: 100.0, 9: 100.0}, "best_of": 1},
    ]  # fmt: skip
    return [
        (SamplingParams(seed=number % 4, **choice), tuple(range(number % 5 + 1)))  # type: ignore[arg-type]
        for number, choice in enumerate(options * 2)
    ]


def test_a_row_does_not_depend_on_its_neighbours():
    asked = mixed_rows()
    logits = torch.randn(len(asked), 60, generator=torch.Generator().manual_seed(1)).bfloat16().float()  # with ties
    together = sample(logits, rows_of(*asked))
    for number, one in enumerate(asked):
        alone = sample(logits[number : number + 1], rows_of(one))[0].tolist()
        num_top = int(rows_of(one).num_top)
        assert read_row(together[number].tolist(), num_top) == read_row(alone, num_top)


def test_among_equal_logits_top_p_keeps_the_same_ones_in_any_company():
    """16-bit models give many equal logits; which of them lie within top_p must not depend on another row's top_k."""
    logits = torch.randint(3, (2, 300), generator=torch.Generator().manual_seed(4)).float()
    for seed in range(40):
        one = (SamplingParams(seed=seed, top_k=9, top_p=0.4), (0,))
        other = (SamplingParams(top_k=250, top_p=0.4), (0,))
        assert tokens(logits, one, other)[0] == tokens(logits[:1], one)[0]
    kept = survivors(logits[:1], SamplingParams(top_p=0.2))
    highest = (logits[0] == 2).nonzero().squeeze(1).tolist()
    assert kept == set(highest[: len(kept)])  # by token id


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.95])
def test_top_p_is_the_same_over_a_vocabulary_too_large_to_sort(spread, top_p):
    """The most probable tokens alone give what top_k = everything, which ranks them all, gives."""
    logits = (torch.randn(6, 20_000, generator=torch.Generator().manual_seed(1)) * spread).bfloat16().float()
    some = [(SamplingParams(seed=seed, top_p=top_p), (0,)) for seed in range(6)]
    everything = [(SamplingParams(seed=seed, top_p=top_p, top_k=20_000), (0,)) for seed in range(6)]
    assert tokens(logits, *some) == tokens(logits, *everything)


def test_a_row_without_usable_logits_has_no_token_and_disturbs_nobody():
    asked = mixed_rows()
    logits = torch.randn(len(asked), 60, generator=torch.Generator().manual_seed(2))
    before = sample(logits, rows_of(*asked))
    broken = {2: math.nan, 5: -math.inf, 7: math.inf, 9: math.nan}
    spoilt = logits.clone()
    for row, value in broken.items():
        spoilt[row, 0 if value == math.inf else slice(None)] = value
    spoilt[9] = logits[9]
    spoilt[9, 33] = math.nan
    after = sample(spoilt, rows_of(*asked))
    for row in range(len(asked)):
        if row in broken:
            assert read_row(after[row].tolist(), 1).token is None
        else:
            assert torch.equal(before[row].nan_to_num(9), after[row].nan_to_num(9))


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.99), SamplingParams(logprobs=3)):
        assert survivors(logits, params) == {0, 2}
    (row,) = sampled(logits, (SamplingParams(logprobs=3), (0,)))
    assert [candidate.token for candidate in row.top] == [0, 2]


def test_last_bit_differences_of_the_logits_do_not_flip_tokens():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3000, 100, generator=generator) * 2
    shaken = logits * (1 + 1e-7 * torch.randn(logits.shape, generator=generator))
    params = SamplingParams(top_p=0.9)
    assert torch.equal(many(logits, params, 3000, "position"), many(shaken, params, 3000, "position"))
