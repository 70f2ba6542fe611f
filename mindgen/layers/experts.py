"""The feed-forward block of a layer with experts: a router sends each token to a few of them.

T tokens, K experts a token, E experts in all, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindgen.layers.linear import ColumnParallelLinear, RowParallelLinear
from mindgen.layers.mlp import MLP
from mindgen.parallel.group import Group


class Router(nn.Module):
    """[T, H] -> weights and numbers, both [T, K], of each token's experts: those with the largest probabilities.

    The weights are the probabilities, in float32, whose sum over a token's experts is one if they are renormalised.
    """

    def __init__(self, weight: nn.Parameter, experts_per_token: int, renormalises: bool):
        super().__init__()
        self.weight = weight
        self._experts_per_token = experts_per_token
        self._renormalises = renormalises

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = F.linear(hidden, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self._experts_per_token, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True) if self._renormalises else weights), experts


class SharedExperts(MLP):
    """The expert that sees every token, [T, H] -> [T, H]; its outputs are times a sigmoid if it has a gate [1, H]."""

    def __init__(
        self,
        linear_fc1: ColumnParallelLinear,
        linear_fc2: RowParallelLinear,
        activation: str,
        gate: nn.Parameter | None,
    ):
        super().__init__(linear_fc1, linear_fc2, activation, is_gated=True)
        self.gate_weight = gate

    def part(self, hidden: Tensor) -> Tensor:
        outputs = super().part(hidden)
        return outputs if self.gate_weight is None else F.linear(hidden, self.gate_weight).sigmoid() * outputs


class ExpertMLP(nn.Module):
    """[T, H] -> [T, H]: every rank has all tokens and computes those of its experts; one all-reduce sums the ranks'.

    experts: this rank's, all or a part of each; `first` is the number of the first.
    """

    def __init__(self, router: Router, experts: list[MLP], first: int, shared: SharedExperts | None, tp: Group):
        super().__init__()
        self.router = router
        self.experts = nn.ModuleDict({"local_experts": nn.ModuleList(experts)})
        self.shared_experts = shared
        self._experts = experts  # typed, under no second name
        self._first = first
        self._tp = tp

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """The block's outputs, plus `residual`."""
        outputs = self._routed(hidden, *self.router(hidden))
        if self.shared_experts is not None:
            outputs = outputs + self.shared_experts.part(hidden)
        if self._tp.size > 1:
            outputs = self._tp.all_reduce(outputs)
        return outputs if residual is None else outputs.add_(residual)

    def _routed(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """weights and experts [T, K] -> [T, H]. Tokens lie in the order of their experts, so that each runs once."""
        order = experts.flatten().argsort(stable=True)  # a number t K + k is the k-th expert of token t
        ends = self._ends(experts)
        mine = order[ends[0] : ends[-1]]
        inputs, scales = hidden[mine // experts.shape[1]], weights.flatten()[mine].unsqueeze(-1)
        parts = [
            expert.part(inputs[start - ends[0] : end - ends[0]])
            for expert, start, end in zip(self._experts, ends, ends[1:], strict=False)
            if end > start
        ]
        outputs = hidden.new_zeros(experts.numel(), hidden.shape[1])
        if parts:
            outputs.index_copy_(0, mine, (torch.cat(parts) * scales).to(hidden.dtype))
        return outputs.view(*experts.shape, -1).sum(dim=1)  # in one order on every device

    def _ends(self, experts: Tensor) -> list[int]:
        """Where the tokens of my first expert begin in the sorted order, and where those of each of mine end."""
        counts = torch.bincount(experts.flatten(), minlength=self.router.weight.shape[0])
        ends: list[int] = [0, *counts.cumsum(dim=0).tolist()]
        return ends[self._first : self._first + len(self._experts) + 1]
