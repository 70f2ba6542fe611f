"""This step's tensors, and the one integer buffer in which they are made and travel to the other ranks.

Legend: T tokens in the step, S sequences, R sampled rows, P scored rows, C block copies, H seen and A added tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from mindgen.engine.request import SEED_LIMIT
from mindgen.engine.scheduler import Chunk, Step

ROW_INTEGERS = ("top_k", "num_top", "min_keep", "beam", "logprob")  # as `RowParams.integers` gives them
ROW_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, eq=False)
class SampleRows:
    """The rows whose next token is wanted; all CPU tensors, float64 or int64.

    A token may be wanted several times, by rows with different seeds. No (row, token) is twice among the added ones.
    """

    at: Tensor  # [R] where among the batch's T tokens the logits are wanted
    seed: Tensor  # [R] 64 bits, those above 2**63 - 1 as negative numbers
    position: Tensor  # [R] the position of the token to be chosen
    top_k: Tensor  # [R] 0 keeps all
    num_top: Tensor  # [R] how many alternatives to return
    min_keep: Tensor  # [R] how many tokens top-k, top-p and min-p leave at least
    beam: Tensor  # [R] 1 where the alternatives are the candidates of a beam
    logprob: Tensor  # [R] 1 where the chosen token's log-probability is wanted
    temperature: Tensor  # [R] float64, 0 for no sampling
    top_p: Tensor  # [R] float64
    min_p: Tensor  # [R] float64
    repetition_penalty: Tensor  # [R] float64, 1 for none
    seen_row: Tensor  # [H]
    seen: Tensor  # [H] token ids so far, each once, only of rows with a repetition penalty
    added_row: Tensor  # [A]
    added_id: Tensor  # [A] the token whose score changes
    added: Tensor  # [A] float64, -inf for a token that cannot come

    def __len__(self) -> int:
        return len(self.at)

    @cached_property
    def most_top(self) -> int:
        """The largest `num_top`, which sets the width of the results."""
        return int(self.num_top.max()) if len(self) else 0

    @cached_property
    def are_greedy(self) -> bool:
        """Whether every row takes its best token: none is drawn, and none belongs to a beam."""
        return not (self.temperature.any() or self.beam.any())


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows whose next token is known and whose log-probability is wanted; int64 CPU tensors."""

    at: Tensor  # [P] where among the batch's T tokens the logits are wanted
    token: Tensor  # [P] the token that follows
    num_top: Tensor  # [P] how many alternatives to return

    def __len__(self) -> int:
        return len(self.at)

    @property
    def most_top(self) -> int:
        """The largest `num_top`."""
        return int(self.num_top.max()) if len(self) else 0

    def split(self, size: int) -> Iterator[ScoredRows]:
        """The same rows, at most `size` at a time."""
        parts = zip(self.at.split(size), self.token.split(size), self.num_top.split(size), strict=True)
        return (ScoredRows(*part) for part in parts if len(part[0]))


@dataclass(frozen=True, eq=False)
class Batch:
    """One step of the model: int64 CPU tensors.

    Sequence s has the queries query_starts[s] to query_starts[s + 1]; they are the last of its context_lens[s] tokens,
    this step's included. Tokens whose blocks were given back, because no layer sees them any more, are not counted, for
    attention goes by distances. Without a cache every query is its sequence's whole context, and slots, block_tables
    and copies are empty. Block tables are filled up with block 0, which means nothing there. `is_long` is empty where
    no sequence is.
    """

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    is_long: Tensor  # [T] 1 for the tokens of long sequences (see Sequence), else 0; or [0]
    slots: Tensor  # [T], or [0] without a cache
    query_starts: Tensor  # [S + 1]
    context_lens: Tensor  # [S]
    block_tables: Tensor  # [S, most blocks of a sequence]
    copies: Tensor  # [C, 2] source and destination block, to be copied before the forward pass
    samples: SampleRows
    scored: ScoredRows
    packed: Tensor  # everything in one int64 vector; the other tensors are views of it

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens.shape[0]

    @property
    def num_results(self) -> int:
        """R + P: the sampled rows come first."""
        return len(self.samples) + len(self.scored)

    @property
    def most_top(self) -> int:
        """The largest number of alternatives that any row wants."""
        return max(self.samples.most_top, self.scored.most_top)

    def pack(self) -> Tensor:
        """Everything in one int64 vector: the sizes, then each part's numbers, floats bit for bit."""
        return self.packed

    @classmethod
    def unpack(cls, packed: Tensor) -> Batch:
        """The batch that `pack` wrote."""
        sizes = packed[:_NUM_SIZES].tolist()
        _, _, _, num_sequences, width, num_copies, num_rows, num_seen, num_added, num_scored = sizes
        (
            tokens, positions, is_long, slots, starts, lengths, tables, copies,
            integers, seen, added, scored, floats, values,
        ) = packed[_NUM_SIZES:].split(_lengths(*sizes))  # fmt: skip
        columns = (
            *integers.view(_NUM_INTEGERS, num_rows).unbind(),
            *floats.view(torch.float64).view(len(ROW_FLOATS), num_rows).unbind(),
            *seen.view(2, num_seen).unbind(),
            *added.view(2, num_added).unbind(),
            values.view(torch.float64),
        )
        return cls(
            tokens, positions, is_long, slots, starts, lengths,
            tables.view(num_sequences, width), copies.view(num_copies, 2),
            SampleRows(*columns), ScoredRows(*scored.view(3, num_scored).unbind()), packed,
        )  # fmt: skip


_NUM_SIZES = 10
_NUM_INTEGERS = 3 + len(ROW_INTEGERS)


def _lengths(
    tokens: int, long: int, slots: int, sequences: int, width: int, copies: int,
    rows: int, seen: int, added: int, scored: int,
) -> list[int]:  # fmt: skip
    """How long each part of a packed batch is."""
    integers, floats = _NUM_INTEGERS * rows, len(ROW_FLOATS) * rows
    ends = [sequences + 1, sequences, sequences * width, 2 * copies]
    return [tokens, tokens, long, slots, *ends, integers, 2 * seen, 2 * added, 3 * scored, floats, added]


def make_batch(step: Step, block_size: int | None) -> Batch:
    """The tensors of a step; `block_size` is None without a cache. To be called before anything else is scheduled."""
    chunks = step.chunks
    tokens = [token for chunk in chunks for token in chunk.tokens]
    positions = [position for chunk in chunks for position in chunk.positions]
    is_long = _is_long(chunks)
    slots = [] if block_size is None else [slot for chunk in chunks for slot in _slots(chunk, block_size)]
    starts = list(accumulate([chunk.length for chunk in chunks], initial=0))
    lengths = [chunk.end - chunk.sequence.num_forgotten * (block_size or 0) for chunk in chunks]
    width = max([len(chunk.sequence.blocks) for chunk in chunks], default=0)
    tables = [block for chunk in chunks for block in _padded(chunk.sequence.blocks, width)]
    copies = [block for pair in step.copies for block in pair]
    rows, scored = _Rows(), _scored(chunks, starts)
    for chunk, end in zip(chunks, starts[1:], strict=True):
        if chunk.num_samples:
            rows.add(chunk, end - 1)
    sizes = [len(tokens), len(is_long), len(slots), len(chunks), width, len(step.copies), *rows.sizes, len(scored) // 3]
    parts = (sizes, tokens, positions, is_long, slots, starts, lengths, tables, copies, *rows.integers, scored)
    packed = array("q", [number for part in parts for number in part])
    packed.frombytes(array("d", rows.floats).tobytes())
    return Batch.unpack(torch.frombuffer(packed, dtype=torch.int64))


def scored_positions(chunk: Chunk) -> range:
    """The positions of the prompt's tokens whose log-probabilities this chunk gives: one after those it computes."""
    sequence = chunk.sequence
    if sequence.request.params.num_prompt_top is None:
        return range(0)
    first, last = max(chunk.start, sequence.num_scored), min(chunk.end, len(sequence.request.prompt) - 1)
    return range(first + 1, max(first, last) + 1)


def _scored(chunks: tuple[Chunk, ...], starts: list[int]) -> list[int]:
    """All places, then all tokens, then all numbers of alternatives."""
    at, tokens, num_top = [], [], []
    for chunk, start in zip(chunks, starts, strict=False):
        if positions := scored_positions(chunk):
            at += [start + position - 1 - chunk.start for position in positions]
            tokens += chunk.sequence.tokens[positions.start : positions.stop]
            num_top += [chunk.sequence.request.params.num_prompt_top or 0] * len(positions)
    return at + tokens + num_top


def _is_long(chunks: tuple[Chunk, ...]) -> list[int]:
    if not any(chunk.sequence.is_long for chunk in chunks):
        return []
    return [int(chunk.sequence.is_long) for chunk in chunks for _ in range(chunk.length)]


def _slots(chunk: Chunk, block_size: int) -> Iterator[int]:
    blocks, forgotten = chunk.sequence.blocks, chunk.sequence.num_forgotten
    for position in chunk.positions:
        yield blocks[position // block_size - forgotten] * block_size + position % block_size


def _padded(blocks: list[int], width: int) -> list[int]:
    return blocks if len(blocks) == width else blocks + [0] * (width - len(blocks))


class _Rows:
    """The sampled rows, one after the other."""

    def __init__(self) -> None:
        self._integers: list[tuple[int, ...]] = []
        self._floats: list[tuple[float, ...]] = []
        self._seen_row: list[int] = []
        self._seen: list[int] = []
        self._added_row: list[int] = []
        self._added_id: list[int] = []
        self._added: list[float] = []

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self._integers), len(self._seen), len(self._added)

    @property
    def integers(self) -> Iterator[tuple[int, ...] | list[int]]:
        """Column after column."""
        yield from zip(*self._integers, strict=True)
        yield from (self._seen_row, self._seen, self._added_row, self._added_id)

    @property
    def floats(self) -> list[float]:
        return [number for column in zip(*self._floats, strict=True) for number in column] + self._added

    def add(self, chunk: Chunk, at: int) -> None:
        """The rows of a chunk whose last token is the batch's token `at`."""
        sequence = chunk.sequence
        sequence.past.read(sequence.tokens)
        for sample in range(chunk.num_samples):
            row = len(self._integers)
            self._integers.append((at, _signed(sequence.row_seed(sample)), chunk.end, *sequence.row.integers))
            self._floats.append(sequence.row.floats)
            self._add_past(row, chunk)

    def _add_past(self, row: int, chunk: Chunk) -> None:
        past = chunk.sequence.past
        if past.seen:
            self._seen_row += [row] * len(past.seen)
            self._seen += past.seen
        if added := past.added(chunk.sequence.tokens):
            self._added_row += [row] * len(added)
            self._added_id += added
            self._added += added.values()


def _signed(seed: int) -> int:
    return seed - SEED_LIMIT if seed >= SEED_LIMIT // 2 else seed
