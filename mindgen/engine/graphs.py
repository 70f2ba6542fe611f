"""Steps of nothing but decodes, replayed from graphs that were captured: one call in place of hundreds.

A graph repeats what the device was asked for, on the same memory and for the same sizes. So steps are filled up to a
few shapes with rows that nobody reads, which write to a block of the cache that nobody owns.

Legend: S sequences in the step, B rows and W blocks a row of the shape, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mindgen.attention.backend import AttentionBackend
from mindgen.attention.decodes import DecodeRows
from mindgen.attention.sdpa import SdpaAttention
from mindgen.device import Recorder, no_graphs
from mindgen.engine.batch import Batch
from mindgen.engine.kv_cache import KVCache
from mindgen.model.decoder import Decoder
from mindgen.parallel.topology import Topology

Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Callable[[], None], Tensor]]
_NUM_COMPARED = 2  # replays of a shape that are compared with what the model computes
_MOST_ERROR = 2.0**-5  # of a row's size: kernels may be chosen anew in a capture, and round otherwise


class Shape(NamedTuple):
    """What a graph is captured for: B rows of W blocks, both powers of two, so that there are few."""

    rows: int
    blocks: int

    @classmethod
    def of(cls, batch: Batch) -> Shape | None:
        """The smallest that has room for a step; None for one with longer queries than a token."""
        sequences, width = batch.block_tables.shape
        return cls(_rounded(sequences), _rounded(width)) if batch.num_tokens == sequences else None


def _rounded(number: int) -> int:
    return 1 << (number - 1).bit_length()


def why_no_graphs(
    device: torch.device, topology: Topology, model: Decoder, backend: AttentionBackend, has_cache: bool
) -> str | None:
    """Why steps cannot be captured on these ranks; None if they can. All ranks find the same."""
    if (reason := no_graphs(device)) is not None:
        return reason
    if topology.tp > 1:
        return f"{topology.tp} tensor parallel ranks meet in every layer, which is not captured yet"
    if not has_cache:
        return "without a cache every step has other sizes"
    if not isinstance(backend, SdpaAttention):
        return f"attention {backend.name!r} goes from sequence to sequence; sdpa does not"
    return "which experts have tokens is looked up in every step" if model.has_experts else None


class StepGraphs:
    """The graphs of one stage, where `why_no_graphs` has no objection, over a cache with a spare block.

    capture: what makes them, by default the device's own.
    """

    def __init__(
        self, model: Decoder, cache: KVCache, backend: AttentionBackend, capture: Capture | None = None
    ) -> None:
        assert isinstance(backend, SdpaAttention)
        self._stage = _Stage(model, cache, backend, capture or Recorder(cache.device))
        self._graphs: dict[Shape, _Graph] = {}

    @property
    def num_replayed(self) -> int:
        """Steps so far whose results are a graph's alone."""
        return sum(graph.num_replayed for graph in self._graphs.values())

    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor | None:
        """Hidden states [S, H] of a step of decodes; None for a step that the model is to compute as ever.

        hidden: what the stage before gave, [S, H]; None on the first, which takes the batch's tokens. Contexts that
        differ so much that a shape for all of them holds more blocks than the cache are not for a graph.
        """
        shape = Shape.of(batch)
        if shape is None or shape.rows * shape.blocks > self._stage.cache.num_blocks:
            return None
        if shape not in self._graphs:
            self._graphs[shape] = _Graph(shape, self._stage)
        graph = self._graphs[shape]
        return graph(batch, hidden) if graph.is_trusted else None


class _Stage(NamedTuple):
    """What the graphs have in common."""

    model: Decoder
    cache: KVCache
    backend: SdpaAttention
    capture: Capture


class _Graph:
    """The steps of one shape: the first one computed, the second captured, and the third compared as the second is.

    A number of the host's that differs between these two would stay as it was at the capture, and show.
    is_trusted: False once a comparison failed or memory did not suffice. num_replayed: steps without a comparison.
    """

    def __init__(self, shape: Shape, stage: _Stage) -> None:
        self._stage, cache, spare = stage, stage.cache, stage.cache.spare_block
        assert spare is not None, "rows that nobody reads need a block that nobody owns"
        blank = torch.zeros(_NUM_NUMBERS + shape.blocks, shape.rows, dtype=torch.int64)
        blank[_NUM_NUMBERS:] = spare
        blank[_SLOT], blank[_CONTEXT] = spare * cache.block_size, 1
        self._blank = blank  # a step of rows that nobody reads
        self._numbers = torch.empty_like(blank, device=cache.device)
        sizes = (shape.rows, stage.model.hidden_size)
        self._hidden = torch.zeros(sizes, dtype=stage.model.dtype, device=cache.device)
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None
        self._num_steps = 0
        self.num_replayed = 0
        self.is_trusted = True

    def __call__(self, batch: Batch, hidden: Tensor | None) -> Tensor | None:
        """[S, H], which the next step does not overwrite; None if memory does not suffice."""
        self._num_steps += 1
        try:
            self._fill(batch, hidden)
            return self._step(batch.num_tokens)
        except torch.OutOfMemoryError:
            self._distrust("there is not enough memory for them")
            return None

    def _step(self, rows: int) -> Tensor:
        if self._num_steps == 1:
            return self._run()[:rows]
        if self._replay is None:
            self._replay, self._result = self._stage.capture(self._run)
        if self._num_steps <= 1 + _NUM_COMPARED:
            return self._compared(rows)
        self.num_replayed += 1
        return self._replayed(rows)

    def _distrust(self, reason: str) -> None:
        self.is_trusted, self._replay, self._result = False, None, None
        rows, blocks = self._blank.shape[1], len(self._blank) - _NUM_NUMBERS
        print(f"graphs: steps of {rows} x {blocks} blocks go on without: {reason}", file=sys.stderr)

    def _fill(self, batch: Batch, hidden: Tensor | None) -> None:
        rows, width = batch.block_tables.shape
        numbers = self._blank.clone()
        named = (batch.tokens, batch.positions, batch.is_long, batch.slots, batch.context_lens)
        for line, part in zip(numbers, named, strict=False):
            line[: len(part)] = part
        numbers[_NUM_NUMBERS : _NUM_NUMBERS + width, :rows] = batch.block_tables.T
        self._numbers.copy_(numbers)
        if hidden is not None:
            self._hidden[:rows] = hidden

    def _run(self) -> Tensor:
        """What is captured: it makes of the filled-in step hidden states [B, H]."""
        tokens, positions, is_long, slots, context = self._numbers[:_NUM_NUMBERS].unbind()
        rows = DecodeRows(positions, is_long, slots, context, self._numbers[_NUM_NUMBERS:].T)
        model = self._stage.model
        prepared = self._stage.backend.prepare_decodes(rows, self._stage.cache)
        return model.forward(self._hidden if model.embedding is None else tokens, prepared)

    def _replayed(self, rows: int) -> Tensor:
        assert self._replay is not None and self._result is not None
        self._replay()
        return self._result[:rows].clone()

    def _compared(self, rows: int) -> Tensor:
        """What the model computes. It writes the step's keys and values too, and last."""
        found = self._replayed(rows)
        expected = self._run()[:rows]
        if not _agree(found, expected):
            self._distrust("a replayed one differs from the model's")
        return expected


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Row by row [S, H], since rows differ in size. One that the model itself cannot compute says nothing."""
    found, expected = found.float(), expected.float()
    near = (found - expected).abs().mean(-1) <= _MOST_ERROR * expected.abs().mean(-1)
    return bool((near | ~expected.isfinite().all(-1)).all())


_SLOT, _CONTEXT, _NUM_NUMBERS = 3, 4, 5  # lines of a step: token, position, is_long, slot, context, then blocks
