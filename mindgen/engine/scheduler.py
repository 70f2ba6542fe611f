"""Decides which tokens run next. Knows nothing about tensors, text or devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindgen.engine.blocks import BlockPool
from mindgen.engine.fits import Sight, check_fits
from mindgen.engine.request import Sequence, Status
from mindgen.engine.stats import Stats
from mindgen.engine.tables import BlockTables
from mindgen.engine.units import Line, Unit


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


class Scheduler:
    """First come, first served; decodes before prompts; long prompts in chunks.

    pool: the blocks, or None to compute every sequence from its first token in every step (no cache).
    max_batch_tokens: tokens a step; without a cache one longer sequence may still run, alone.
    num_stages: how many steps can be in flight. Their sequences are disjoint, and a step takes at most its share of
        the active sequences, so that no stage idles while there is work for it.
    max_sequences: how many sequences may be in progress. max_positions: the longest context of the model.
    window: how many tokens the model sees, if no layer sees more; blocks further back are given back early.
    short_context: the most tokens of a sequence before its positions are turned in another way, if ever; one that
        outgrows it is computed anew from its first token.

    Blocks are taken as they are needed. When there are none for a sequence, the last admitted one that is not in flight
    gives up its own, goes back to the front of those that wait, and is computed anew later. Only a sequence admitted
    earlier can do that to it, so the first admitted always ends. A sequence with nobody behind it waits in its place.
    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        pool: BlockPool | None,
        max_batch_tokens: int = 2048,
        num_stages: int = 1,
        max_sequences: int = 256,
        max_positions: int | None = None,
        window: int | None = None,
        short_context: int | None = None,
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
        self.short_context = short_context
        self.sight = Sight(window, max_batch_tokens) if window else None
        self._tables = BlockTables(pool, self.sight) if pool else None
        self._waiting = Line()
        self._running: list[Unit] = []  # by order of admission; samples stand behind the one they were split from
        self._requests: dict[int, list[Unit]] = {}
        self._num_computed = self._num_reused = self._num_preemptions = 0

    @property
    def block_size(self) -> int | None:
        """Tokens a block; None without a cache."""
        return self.pool.block_size if self.pool else None

    @property
    def has_work(self) -> bool:
        """True while a request is waiting or in progress."""
        return bool(self._requests)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that wait, run or are in flight, by order of arrival of their requests."""
        return [sequence for units in self._requests.values() for unit in units for sequence in unit.sequences]

    @property
    def running(self) -> Iterator[Sequence]:
        """Those that do not wait, by order of admission."""
        return (sequence for unit in self._running for sequence in unit.sequences)

    @property
    def stats(self) -> Stats:
        pool = self.pool
        return Stats(
            self._num_computed,
            self._num_reused,
            self._num_preemptions,
            sum(len(unit.sequences) for unit in self._running),
            sum(len(unit.sequences) for unit in self._waiting),
            pool.num_blocks if pool else 0,
            pool.num_used if pool else 0,
            pool.num_cached if pool else 0,
        )

    def submit(self, sequence: Sequence) -> None:
        """Queue the first sequence of a request. Raises ValueError for a request that could never be served."""
        request = sequence.request
        if request.id in self._requests:
            raise ValueError(f"request {request.id} is in progress already; every request needs an id of its own")
        check_fits(request, self.pool, self.max_sequences, self.max_batch_tokens, self.max_positions, self.sight)
        unit = Unit([sequence], together=request.params.num_beams > 1)
        self._lengthen([sequence])
        self._requests[request.id] = [unit]
        self._waiting.join(unit, self._blocks_to_start(unit))

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can run before a step in flight is committed."""
        if self.short_context:
            self._lengthen(list(self.running))
        self._admit()
        chunks: list[Chunk] = []
        copies: list[tuple[int, int]] = []
        budget = self.max_batch_tokens
        most = -(-sum(len(unit.sequences) for unit in self._running) // self.num_stages)
        for unit in self._in_order():
            parts = self._parts(unit, budget, alone=not chunks) if unit.admitted else []  # it was when this began
            if not parts or (chunks and len(chunks) + len(parts) > most):
                continue
            room = self._make_room(unit, parts)
            if room is not None:
                copies += room
                for sequence, length in parts:
                    chunks.append(_chunk(sequence, length))
                    budget -= length
        return Step(tuple(chunks), tuple(copies)) if chunks else None

    def commit(self, step: Step) -> None:
        """The step is computed: its sequences may be scheduled again, and those that were ended meanwhile go."""
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.in_flight = False
            self._num_computed += chunk.length
            if self._tables:
                self._tables.commit(sequence, chunk.end)
            if sequence.status is Status.FINISHED:
                self._remove(sequence)

    def split(self, sequence: Sequence) -> list[Sequence]:
        """The sequences of a prompt whose samples are drawn: itself first, then the others, sharing its blocks."""
        if sequence.num_samples == 1:
            return [sequence]
        others = [self._fork(sequence, index) for index in range(1, sequence.num_samples)]
        sequence.num_samples = 1
        units = [Unit([other], admitted=True) for other in others]
        self._requests[sequence.request.id] += units
        place = self._running.index(self._unit_of(sequence)) + 1
        self._running[place:place] = units
        return [sequence, *others]

    def replace(self, parents: list[Sequence]) -> list[Sequence]:
        """New beams, each continuing its parent, in the place of all the sequences of the request."""
        unit = self._unit_of(parents[0])
        old, new = unit.sequences, [self._fork(parent, index) for index, parent in enumerate(parents)]
        unit.sequences = old + new
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
        for sequence in [sequence for unit in self._requests[request_id] for sequence in unit.sequences]:
            self.finish(sequence)

    def _lengthen(self, sequences: list[Sequence]) -> None:
        """Those that outgrew the short context give back their blocks, which are worth nothing to them any more.

        None of them is in flight, for it got its last token after that.
        """
        for sequence in sequences:
            if self.short_context and len(sequence.tokens) > self.short_context and not sequence.is_long:
                if self._tables:
                    self._tables.release(sequence)
                sequence.begin_long()

    def _admit(self) -> None:
        """First come, first served, but who does not fit yet lets a few pass who do."""
        places, blocks = self._room()
        while places > 0 and blocks > 0:
            if not self._running:
                unit: Unit | None = next(iter(self._waiting))
            else:
                unit = self._waiting.first_fit(places, blocks, self._num_shared)
            if unit is None:
                return
            self._waiting.overtake(unit)
            unit.admit()
            self._running.append(unit)
            places, blocks = self._room()

    def _room(self) -> tuple[int, int]:
        """How many sequences may be admitted, and with how many blocks: those that the running ones leave, which lack
        some for their tokens so far and may soon want one more each.

        Answers have no blocks set aside: this only keeps one from being admitted to be preempted at once.
        """
        if not self._waiting:
            return 0, 0
        places = self.max_sequences - sum(unit.width for unit in self._running)
        if self.pool is None or self._tables is None:
            return places, 1
        lacks = sum(1 + self._tables.lacks(unit.sequences) for unit in self._running)
        return places, self.pool.num_available - lacks

    def _blocks_to_start(self, unit: Unit) -> int:
        """The blocks for its tokens so far, also those that others use."""
        return self._tables.lacks(unit.sequences) if self._tables else 0

    def _num_shared(self, unit: Unit) -> int:
        return self._tables.num_in_use(unit.sequences[0]) if self._tables else 0

    def _in_order(self) -> list[Unit]:
        """Those who run and are not in flight: decodes first, each kind by order of admission."""
        decodes: list[Unit] = []
        others: list[Unit] = []
        for unit in self._running:
            if not unit.in_flight:
                (others if unit.is_behind else decodes).append(unit)
        return decodes + others

    def _parts(self, unit: Unit, budget: int, alone: bool) -> list[tuple[Sequence, int]]:
        """Which sequences of a unit run in a step with `budget` tokens left, each with its number of tokens.

        Beams that have to be computed anew catch up one after the other, up to their last tokens, and so find what
        they have in common; the last tokens share a step.
        """
        if self._tables is None:
            parts = [(sequence, sequence.num_left) for sequence in unit.sequences]
            return parts if alone or sum(length for _, length in parts) <= budget else []
        if not budget:
            return []
        last = 1 if len(unit.sequences) > 1 else 0
        for sequence in unit.sequences:
            if not sequence.num_computed:
                if self._tables.is_coming(sequence, self._in_flight()):
                    return []
                self._num_reused += self._tables.take_known(sequence)
            if sequence.num_left > 1:
                return [(sequence, min(sequence.num_left - last, budget))]
        return [(sequence, 1) for sequence in unit.sequences] if len(unit.sequences) <= budget else []

    def _in_flight(self) -> Iterator[Sequence]:
        return (sequence for sequence in self.running if sequence.in_flight)

    def _make_room(self, unit: Unit, parts: list[tuple[Sequence, int]]) -> list[tuple[int, int]] | None:
        """Give these parts their blocks; the copies that this takes. None if there are none: those who could give
        theirs are in flight, or nobody was admitted later."""
        if self._tables is None or self.pool is None:
            return []
        ends = [(sequence, sequence.num_computed + length) for sequence, length in parts]
        while missing := self._tables.num_missing(ends):
            if missing <= self.pool.num_available:
                return [pair for sequence, end in ends for pair in self._tables.grow(sequence, end)]
            victim = self._last_admitted(after=unit)
            if victim is None:
                return None
            self._preempt(victim)
        return []

    def _last_admitted(self, after: Unit) -> Unit | None:
        """The last one admitted after `after` that is not in flight."""
        for unit in reversed(self._running):
            if unit is after:
                return None
            if not unit.in_flight:
                return unit
        return None

    def _preempt(self, unit: Unit) -> None:
        assert self._tables
        self._num_preemptions += sum(1 for sequence in unit.sequences if sequence.num_computed)
        for sequence in unit.sequences:
            self._tables.release(sequence)
        unit.send_back()
        self._running.remove(unit)
        self._waiting.send_back(unit, self._blocks_to_start(unit))

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        child = parent.fork(index)
        if self._tables:
            self._tables.share(parent, child)
        return child

    def _unit_of(self, sequence: Sequence) -> Unit:
        return next(unit for unit in self._requests[sequence.request.id] if sequence in unit.sequences)

    def _remove(self, sequence: Sequence) -> None:
        unit = self._unit_of(sequence)
        unit.sequences.remove(sequence)
        if self._tables:
            self._tables.release(sequence)
        if not unit.sequences:
            self._drop(unit, sequence.request.id)

    def _drop(self, unit: Unit, request_id: int) -> None:
        if unit.admitted:
            self._running.remove(unit)
        else:
            self._waiting.leave(unit)
        units = self._requests[request_id]
        units.remove(unit)
        if not units:
            del self._requests[request_id]


def _chunk(sequence: Sequence, length: int) -> Chunk:
    """Marks the sequence as being in flight. Rows are drawn once its last token is computed."""
    sequence.in_flight = True
    start = sequence.num_computed
    complete = start + length == len(sequence.tokens)
    return Chunk(sequence, start, length, sequence.num_samples if complete else 0)
