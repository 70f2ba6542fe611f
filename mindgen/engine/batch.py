"""This step's tensors, and the one integer buffer in which they travel to the other ranks.

Legend: T tokens in the step, S sequences, R sampled rows, C block copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from mindgen.engine.request import SEED_LIMIT, RowParams
from mindgen.engine.scheduler import Chunk, Step


@dataclass(frozen=True, eq=False)
class SampleRows:
    """The rows whose next token is wanted; all CPU tensors, float64 or int64.

    A token may be wanted several times, by rows with different seeds.
    """

    at: Tensor  # [R] where among the batch's T tokens the logits are wanted
    temperature: Tensor  # [R] float64, 0 for no sampling
    top_k: Tensor  # [R] 0 keeps all
    top_p: Tensor  # [R] float64
    repetition_penalty: Tensor  # [R] float64, 1 for none
    seed: Tensor  # [R] 64 bits, those above 2**63 - 1 as negative numbers
    position: Tensor  # [R] the position of the token to be chosen
    num_top: Tensor  # [R] how many alternatives to return
    min_keep: Tensor  # [R] how many tokens top-k and top-p leave at least
    beam: Tensor  # [R] 1 where the alternatives are the candidates of a beam
    history_starts: Tensor  # [R + 1] bounds of each row's tokens in `history`
    history: Tensor  # token ids so far, only of rows with a repetition penalty

    def __len__(self) -> int:
        return len(self.at)

    @property
    def most_top(self) -> int:
        """The largest `num_top`, which sets the width of the results."""
        return int(self.num_top.max()) if len(self) else 0


@dataclass(frozen=True, eq=False)
class Batch:
    """One step of the model: int64 CPU tensors.

    Sequence s has the queries query_starts[s] to query_starts[s + 1]; they are the last of its context_lens[s] tokens,
    this step's included. Without a cache every query is its sequence's whole context, and slots, block_tables and
    copies are empty. Block tables are filled up with block 0, which means nothing there.
    """

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T], or [0] without a cache
    query_starts: Tensor  # [S + 1]
    context_lens: Tensor  # [S]
    block_tables: Tensor  # [S, most blocks of a sequence]
    copies: Tensor  # [C, 2] source and destination block, to be copied before the forward pass
    samples: SampleRows

    @property
    def sample_rows(self) -> Tensor:
        """Where in the T tokens logits are wanted [R]; a token may appear more than once."""
        return self.samples.at

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens)

    def pack(self) -> Tensor:
        """Everything in one int64 vector: each field's shape, then each field's numbers, floats bit for bit."""
        parts = [part.contiguous() for part in _tensors(self)]
        shapes = [size for part in parts for size in _shape(part)]
        return torch.cat([_ints(shapes), *(part.view(torch.int64).flatten() for part in parts)])

    @classmethod
    def unpack(cls, packed: Tensor) -> Batch:
        """The batch that `pack` wrote."""
        parts = dict(zip(_NAMES, _split(packed.contiguous()), strict=True))
        samples = SampleRows(**{name: parts.pop(name) for name in _SAMPLE_NAMES})
        return cls(**parts, samples=samples)


_BATCH_NAMES = tuple(item.name for item in fields(Batch) if item.name != "samples")
_SAMPLE_NAMES = tuple(item.name for item in fields(SampleRows))
_NAMES = _BATCH_NAMES + _SAMPLE_NAMES
_FLOATS = ("temperature", "top_p", "repetition_penalty")
_VECTOR = -1  # stands for the missing second size


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for name in _BATCH_NAMES:
        yield getattr(batch, name)
    for name in _SAMPLE_NAMES:
        yield getattr(batch.samples, name)


def _shape(part: Tensor) -> tuple[int, int]:
    return (part.shape[0], _VECTOR) if part.dim() == 1 else (part.shape[0], part.shape[1])


def _split(packed: Tensor) -> Iterator[Tensor]:
    shapes = packed[: 2 * len(_NAMES)].view(-1, 2).tolist()
    offset = 2 * len(_NAMES)
    for name, (rows, columns) in zip(_NAMES, shapes, strict=True):
        size = rows if columns == _VECTOR else rows * columns
        part = packed[offset : offset + size]
        offset += size
        part = part.view(torch.float64) if name in _FLOATS else part
        yield part if columns == _VECTOR else part.view(rows, columns)
    assert offset == len(packed), f"a batch of {len(packed)} numbers was read up to {offset}"


def make_batch(step: Step, block_size: int | None) -> Batch:
    """The tensors of a step; `block_size` is None without a cache. To be called before anything else is scheduled."""
    chunks = step.chunks
    most_blocks = max((len(chunk.sequence.blocks) for chunk in chunks), default=0)
    return Batch(
        tokens=_ints(token for chunk in chunks for token in chunk.tokens),
        positions=_ints(position for chunk in chunks for position in chunk.positions),
        slots=_ints(slot for chunk in chunks for slot in _slots(chunk, block_size)),
        query_starts=_ints(accumulate((chunk.length for chunk in chunks), initial=0)),
        context_lens=_ints(chunk.end for chunk in chunks),
        block_tables=_table([chunk.sequence.blocks for chunk in chunks], most_blocks),
        copies=_ints(block for pair in step.copies for block in pair).view(-1, 2),
        samples=_sample_rows(chunks),
    )


def _slots(chunk: Chunk, block_size: int | None) -> Iterator[int]:
    if block_size is not None:
        blocks = chunk.sequence.blocks
        for position in chunk.positions:
            yield blocks[position // block_size] * block_size + position % block_size


def _table(rows: list[list[int]], width: int) -> Tensor:
    return _ints(block for row in rows for block in row + [0] * (width - len(row))).view(len(rows), width)


def _sample_rows(chunks: tuple[Chunk, ...]) -> SampleRows:
    ends = accumulate(chunk.length for chunk in chunks)
    rows = [
        (end - 1, chunk, chunk.sequence.row_seed(sample))
        for end, chunk in zip(ends, chunks, strict=True)
        for sample in range(chunk.num_samples)
    ]
    params = [chunk.sequence.row for _, chunk, _ in rows]
    histories = [_history(chunk, row) for (_, chunk, _), row in zip(rows, params, strict=True)]
    return SampleRows(
        at=_ints(token for token, _, _ in rows),
        temperature=_floats(row.temperature for row in params),
        top_k=_ints(row.top_k for row in params),
        top_p=_floats(row.top_p for row in params),
        repetition_penalty=_floats(row.repetition_penalty for row in params),
        seed=_ints(_signed(seed) for _, _, seed in rows),
        position=_ints(chunk.end for _, chunk, _ in rows),
        num_top=_ints(row.num_top for row in params),
        min_keep=_ints(row.min_keep for row in params),
        beam=_ints(int(row.beam) for row in params),
        history_starts=_ints(accumulate((len(history) for history in histories), initial=0)),
        history=_ints(token for history in histories for token in history),
    )


def _history(chunk: Chunk, row: RowParams) -> list[int]:
    return chunk.sequence.tokens if row.repetition_penalty != 1.0 else []


def _signed(seed: int) -> int:
    return seed - SEED_LIMIT if seed >= SEED_LIMIT // 2 else seed


def _ints(numbers: object) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)  # type: ignore[call-overload]


def _floats(numbers: object) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64)  # type: ignore[call-overload]
