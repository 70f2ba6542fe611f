"""Batches made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def whole_prompt(ids: list[int]) -> Any:
    """A batch of one sequence without a cache."""
    return SimpleNamespace(
        positions=torch.arange(len(ids)),
        query_starts=torch.tensor([0, len(ids)]),
        context_lens=torch.tensor([len(ids)]),
        slots=torch.empty(0, dtype=torch.int64),
        block_tables=torch.empty(1, 0, dtype=torch.int64),
    )
