"""The block of experts alone: which experts run, with which tokens, on which rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mindgen.layers.experts import ExpertMLP, Router
from mindgen.parallel.group import SingleGroup

HIDDEN, EXPERTS, EACH = 8, 6, 2


class Expert(nn.Module):
    """Multiplies by its own matrix, and keeps how many tokens each call had."""

    def __init__(self, number: int):
        super().__init__()
        self.matrix = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(number))
        self.calls: list[int] = []

    def part(self, inputs: Tensor) -> Tensor:
        self.calls.append(len(inputs))
        return inputs @ self.matrix


def router(weight: Tensor) -> Router:
    return Router(nn.Parameter(weight, requires_grad=False), EACH, renormalises=True)


def block(weight: Tensor, numbers: range) -> ExpertMLP:
    return ExpertMLP(router(weight), [Expert(n) for n in numbers], numbers.start, None, SingleGroup())  # type: ignore[misc]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(10))


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(11))


def one_token_after_the_other(weight: Tensor, hidden: Tensor) -> Tensor:
    outputs = torch.zeros_like(hidden)
    for number, token in enumerate(hidden):
        probabilities = (weight @ token).softmax(dim=0)
        best = probabilities.argsort(descending=True)[:EACH]
        for expert in best.tolist():
            share = probabilities[expert] / probabilities[best].sum()
            outputs[number] += share * (token @ Expert(expert).matrix)
    return outputs


def test_every_token_gets_the_mean_of_its_experts(weight: Tensor, hidden: Tensor) -> None:
    whole = block(weight, range(EXPERTS))
    assert torch.allclose(whole(hidden), one_token_after_the_other(weight, hidden), atol=1e-5)
    assert torch.allclose(whole(hidden, hidden), hidden + one_token_after_the_other(weight, hidden), atol=1e-5)


def test_each_expert_with_tokens_runs_once_and_no_other_at_all(weight: Tensor, hidden: Tensor) -> None:
    few = block(weight, range(EXPERTS))
    few(hidden[:1])
    calls = [expert.calls for expert in few._experts]  # type: ignore[attr-defined]
    assert sorted(calls) == [[]] * (EXPERTS - EACH) + [[1]] * EACH
    many = block(weight, range(EXPERTS))
    many(hidden)
    calls = [expert.calls for expert in many._experts]  # type: ignore[attr-defined]
    assert max(map(len, calls)) == 1 and sum(map(sum, calls)) == EACH * len(hidden)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_ranks_with_some_of_the_experts_add_up_to_all(weight: Tensor, hidden: Tensor, each: int) -> None:
    parts = [block(weight, range(first, first + each))(hidden) for first in range(0, EXPERTS, each)]
    assert torch.allclose(torch.stack(parts).sum(dim=0), one_token_after_the_other(weight, hidden), atol=1e-5)


def test_a_rank_of_which_no_token_wants_an_expert_adds_nothing(weight: Tensor, hidden: Tensor) -> None:
    _, chosen = router(weight)(hidden[:1])
    idle = next(n for n in range(EXPERTS) if n not in chosen)
    assert not block(weight, range(idle, idle + 1))(hidden[:1]).any()
