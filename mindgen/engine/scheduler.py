"""Decides which tokens run next. Knows nothing about tensors, text or devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mindgen.engine.blocks import BlockPool
from mindgen.engine.request import Sequence, Status


@dataclass(frozen=True)
class Chunk:
    """The part of a sequence that one step computes: `length` tokens from `start`, then `num_samples` rows drawn."""

    sequence: Sequence
    start: int
    length: int
    num_samples: int

    @property
    def end(self) -> int:
        """The position after its last token: the sequence's context when the step is done."""
        return self.start + self.length

    @property
    def positions(self) -> range:
        return range(self.start, self.end)

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.start : self.end]


@dataclass(frozen=True)
class Step:
    """One turn of the loop: chunks of different sequences, and (source, destination) blocks to copy before them."""

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(eq=False)
class Job:
    """A request being served: its sequences in progress and the blocks set aside for them.

    together: its sequences only make sense in one step, because a beam search compares them.
    """

    sequences: list[Sequence]
    num_reserved: int
    width: int
    together: bool

    def units(self) -> Iterator[list[Sequence]]:
        """The sequences that can be scheduled now, those that must share a step side by side."""
        free = [sequence for sequence in self.sequences if not sequence.in_flight]
        if self.together:
            if len(free) == len(self.sequences):
                yield free
        else:
            yield from ([sequence] for sequence in free)


class Scheduler:
    """First come, first served; decodes before prompts; long prompts in chunks.

    pool: the blocks, or None to compute every sequence from its first token in every step (no cache).
    max_batch_tokens: tokens a step; without a cache one longer sequence may still run, alone.
    num_stages: how many steps can be in flight. Their sequences are disjoint, and a step takes at most its share of
        the active sequences, so that no stage idles while there is work for it.
    max_sequences: how many sequences may be in progress. max_positions: the longest context of the model.

    A request is admitted when the blocks for the longest answers it can give are free, and they are set aside: once
    started, it ends. Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        pool: BlockPool | None,
        max_batch_tokens: int = 2048,
        num_stages: int = 1,
        max_sequences: int = 256,
        max_positions: int | None = None,
    ) -> None:
        sizes = {"max_batch_tokens": max_batch_tokens, "num_stages": num_stages, "max_sequences": max_sequences}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be 1 or more")
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.num_stages = num_stages
        self.max_sequences = max_sequences
        self.max_positions = max_positions
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._jobs: dict[int, Job] = {}

    @property
    def block_size(self) -> int | None:
        """Tokens a block; None without a cache."""
        return self.pool.block_size if self.pool else None

    @property
    def has_work(self) -> bool:
        """True while a request is waiting or in progress."""
        return bool(self._jobs)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that wait, run or are in flight, by order of arrival of their requests."""
        return [sequence for job in self._jobs.values() for sequence in job.sequences]

    def submit(self, sequence: Sequence) -> None:
        """Queue the first sequence of a request. Raises ValueError for a request that could never be served."""
        request = sequence.request
        if request.id in self._jobs:
            raise ValueError(f"request {request.id} is in progress already; every request needs an id of its own")
        self._check_fits(sequence)
        params = request.params
        job = Job([sequence], self._blocks_needed(sequence), _width(sequence), together=params.num_beams > 1)
        self._jobs[request.id] = job
        self._waiting.append(job)

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can run before a step in flight is committed."""
        self._admit()
        chunks: list[Chunk] = []
        copies: list[tuple[int, int]] = []
        for sequence, length in self._choose():
            copies += self._make_room(sequence, sequence.num_computed + length)
            chunks.append(_chunk(sequence, length))
        return Step(tuple(chunks), tuple(copies)) if chunks else None

    def commit(self, step: Step) -> None:
        """The step is computed: its sequences may be scheduled again, and those that were ended meanwhile go."""
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.in_flight = False
            if sequence.status is Status.FINISHED:
                self._remove(sequence)
            elif self.pool:
                sequence.num_computed = chunk.end

    def split(self, sequence: Sequence) -> list[Sequence]:
        """The sequences of a prompt whose samples are drawn: itself first, then the others, sharing its blocks."""
        job = self._jobs[sequence.request.id]
        others = [self._fork(sequence, index) for index in range(1, sequence.num_samples)]
        sequence.num_samples = 1
        job.sequences += others
        return [sequence, *others]

    def replace(self, parents: list[Sequence]) -> list[Sequence]:
        """New beams, each continuing its parent, in the place of all the sequences of the request."""
        job = self._jobs[parents[0].request.id]
        old, new = job.sequences, [self._fork(parent, index) for index, parent in enumerate(parents)]
        job.sequences = old + new
        for sequence in old:
            self.finish(sequence)
        return new

    def finish(self, sequence: Sequence) -> None:
        """End a sequence. Its blocks are free at once, or when the step that it is in is committed."""
        sequence.status = Status.FINISHED
        if not sequence.in_flight:
            self._remove(sequence)

    def abort(self, request_id: int) -> None:
        """End all sequences of a request, wherever they are."""
        job = self._jobs[request_id]
        if job in self._waiting:
            self._waiting.remove(job)
        for sequence in list(job.sequences):
            self.finish(sequence)

    def _admit(self) -> None:
        reserved = sum(job.num_reserved for job in self._running)
        width = sum(job.width for job in self._running)
        while self._waiting:
            job = self._waiting[0]
            reserved, width = reserved + job.num_reserved, width + job.width
            if width > self.max_sequences or (self.pool and reserved > self.pool.num_blocks):
                return
            job.sequences[0].status = Status.RUNNING
            self._running.append(self._waiting.popleft())

    def _choose(self) -> Iterator[tuple[Sequence, int]]:
        """The sequences of the next step, each with the number of tokens to compute."""
        units = [unit for job in self._running for unit in job.units()]
        units.sort(key=lambda unit: unit[0].num_left > 1)  # decodes first; the sort keeps the order of arrival
        most = -(-sum(len(job.sequences) for job in self._running) // self.num_stages)
        budget, count = self.max_batch_tokens, 0
        for unit in units:
            length = self._length(unit, budget, alone=not count)
            if length and (not count or count + len(unit) <= most):
                yield from ((sequence, min(sequence.num_left, length)) for sequence in unit)
                budget, count = budget - length, count + len(unit)

    def _length(self, unit: list[Sequence], budget: int, alone: bool) -> int:
        """How many tokens of a unit a step with `budget` tokens left computes; 0 if it has to wait."""
        need = sum(sequence.num_left for sequence in unit)
        if need <= budget or (alone and self.pool is None):
            return need
        return budget if len(unit) == 1 and self.pool else 0

    def _make_room(self, sequence: Sequence, end: int) -> list[tuple[int, int]]:
        """Give a sequence blocks of its own to write up to `end`; the copies that this takes."""
        if self.pool is None:
            return []
        copies = []
        tail = sequence.num_computed // self.pool.block_size
        if tail < len(sequence.blocks) and self.pool.is_shared(sequence.blocks[tail]):
            shared, own = sequence.blocks[tail], self.pool.allocate()
            self.pool.release([shared])
            sequence.blocks[tail] = own
            copies.append((shared, own))
        while len(sequence.blocks) < self.pool.blocks_for(end):
            sequence.blocks.append(self.pool.allocate())
        return copies

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        child = parent.fork(index)
        if self.pool:
            child.blocks = self.pool.share(parent.blocks)
        return child

    def _remove(self, sequence: Sequence) -> None:
        job = self._jobs[sequence.request.id]
        job.sequences.remove(sequence)
        if self.pool:
            self.pool.release(sequence.blocks)
            sequence.blocks = []
        if not job.sequences:
            del self._jobs[sequence.request.id]
            if job in self._running:
                self._running.remove(job)

    def _blocks_needed(self, sequence: Sequence) -> int:
        """Blocks for the longest answers: full blocks of the prompt are shared, the rest is each sequence's own."""
        if self.pool is None:
            return 0
        num_prompt = len(sequence.request.prompt)
        total = self.pool.blocks_for(num_prompt + sequence.request.params.max_new_tokens)
        shared = num_prompt // self.pool.block_size
        return shared + _width(sequence) * (total - shared)

    def _check_fits(self, sequence: Sequence) -> None:
        request, width = sequence.request, _width(sequence)
        num_prompt, num_new = len(request.prompt), request.params.max_new_tokens
        size = f"request {request.id} has {num_prompt} prompt tokens and may generate {num_new}"
        if self.max_positions and num_prompt + num_new > self.max_positions:
            raise ValueError(
                f"{size}, together {num_prompt + num_new}, but the model's context is {self.max_positions}; "
                f"shorten the prompt or set max_new_tokens to {max(0, self.max_positions - num_prompt)} or less"
            )
        if width > self.max_sequences:
            raise ValueError(
                f"request {request.id} wants {width} sequences at once, but at most {self.max_sequences} run together; "
                "lower n or num_beams, or raise max_sequences"
            )
        if request.params.num_beams > self.max_batch_tokens:
            raise ValueError(
                f"request {request.id} has {width} beams, which share a step, but a step takes {self.max_batch_tokens} "
                "tokens; lower num_beams or raise max_batch_tokens"
            )
        need = self._blocks_needed(sequence)
        if self.pool and need > self.pool.num_blocks:
            raise ValueError(
                f"{size} in {width} sequence{'s'[: width > 1]}, which takes {need} blocks of {self.pool.block_size} "
                f"tokens, but the cache has {self.pool.num_blocks}; lower max_new_tokens, n or num_beams, or enlarge "
                "the cache"
            )


def _width(sequence: Sequence) -> int:
    """How many sequences a request may become."""
    return max(sequence.request.params.n, sequence.request.params.num_beams)


def _chunk(sequence: Sequence, length: int) -> Chunk:
    """Marks the sequence as being in flight. Rows are drawn once its last token is computed."""
    sequence.in_flight = True
    start = sequence.num_computed
    complete = start + length == len(sequence.tokens)
    return Chunk(sequence, start, length, sequence.num_samples if complete else 0)
