"""What a forward pass must read and compute, counted from rows and spec, and how fast a machine can do that at best.

Counts are of all ranks together, padding and replicated KV heads included: each rank has its own share to do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from mindgen.parallel.topology import Topology
from mindgen.spec import ModelSpec
from mindgen.weights.families import rows_of
from mindgen.weights.rows import EMBEDDING, HEAD, Row, axis_sizes, local_sizes, rows_of_layer


@dataclass(frozen=True)
class Work:
    """Counts of one model.

    weight_bytes: read by every step: all parameters but the embedding, of which a step reads a few rows, and experts;
    a tied embedding counts as the head that it is too. cache_bytes: read for each token of context. linear_flops: of
    the layers' matrices, for each token. head_flops: for each position whose logits are wanted. pair_flops: of
    attention, for each pair of a query and a token that it sees. windows: the farthest that a query sees in each
    layer, or None. experts: what comes on top in a model that has them.
    A multiplication and an addition are two FLOPs.
    """

    weight_bytes: int
    cache_bytes: int
    linear_flops: int
    head_flops: int
    pair_flops: int
    windows: tuple[int | None, ...] = (None,)
    experts: Experts | None = None

    def decode_step(self, batch_size: int, context: float) -> Cost:
        """One step in which each of `batch_size` sequences computes one token that sees `context` tokens."""
        seen = sum(min(context, window or context) for window in self.windows) / len(self.windows)
        flops = self.linear_flops + self.head_flops + self.pair_flops * seen
        return Cost(self._read(batch_size) + batch_size * seen * self.cache_bytes, batch_size * flops)

    def prefill(self, batch_size: int, length: int) -> Cost:
        """Prompts of `length` tokens and the first token of each, all in one step."""
        pairs = sum(_pairs(length, min(length, window or length)) for window in self.windows) / len(self.windows)
        flops = length * self.linear_flops + self.head_flops + pairs * self.pair_flops
        return Cost(self._read(batch_size * length), batch_size * flops)

    def decode(self, batch_size: int, input_len: int, output_len: int) -> Cost:
        """The steps after the first token: `output_len` - 1 of them, at growing context."""
        steps = output_len - 1
        return steps * self.decode_step(batch_size, input_len + output_len / 2)

    def stored(self, share: float) -> Work:
        """The same where weights are stored in that share of their size."""
        experts = self.experts and replace(self.experts, bytes_of_one=round(share * self.experts.bytes_of_one))
        return replace(self, weight_bytes=round(share * self.weight_bytes), experts=experts)

    def _read(self, num_tokens: int) -> float:
        return self.weight_bytes + (self.experts.num_bytes(num_tokens) if self.experts else 0.0)


@dataclass(frozen=True)
class Experts:
    """The experts of all layers: how many there are in each, how many a token goes to, and the bytes of one in all."""

    number: int
    per_token: int
    bytes_of_one: int

    def num_bytes(self, num_tokens: int) -> float:
        """What tokens that choose experts by chance are expected to read."""
        missed = (1 - self.per_token / self.number) ** num_tokens
        return self.number * (1 - missed) * self.bytes_of_one


@dataclass(frozen=True)
class Cost:
    """Bytes that must be read and FLOPs that must be computed."""

    num_bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def __rmul__(self, times: float) -> Cost:
        return Cost(self.num_bytes * times, self.flops * times)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.num_bytes

    def seconds(self, read_rate: float, matrix_rate: float) -> float:
        """The shortest time on a machine that reads `read_rate` bytes and computes `matrix_rate` FLOPs a second."""
        return max(self.num_bytes / read_rate, self.flops / matrix_rate)


def count_work(spec: ModelSpec, itemsize: int, tp: int = 1) -> Work:
    """The counts of a model over `tp` tensor ranks, weights and cache of `itemsize` bytes an element."""
    sizes = local_sizes(spec, Topology(0, tp, 1))
    rows = rows_of(spec.family)
    plain = [row for row in rows if not row.is_expert]
    weights = sum(_count(row, sizes) * _times(row, spec) for row in plain if row.name != EMBEDDING)
    expert = sum(_count(row, sizes) * _times(row, spec) for row in rows if row.is_expert)
    linears = sum(_count(row, sizes) * _times(row, spec) for row in plain if row.stage == "layer" and "|" in row.axes)
    head = next(row for row in rows if row.name == HEAD)
    heads, chosen = max(spec.num_kv_heads, tp), spec.experts_per_token or 0
    return Work(
        weight_bytes=tp * weights * itemsize,
        cache_bytes=2 * spec.num_layers * heads * spec.head_dim * itemsize,
        linear_flops=2 * tp * (linears + chosen * expert),
        head_flops=2 * tp * _count(head, sizes),
        pair_flops=4 * spec.num_layers * spec.num_heads * spec.head_dim,
        windows=tuple(spec.window(layer) for layer in range(spec.num_layers)),
        experts=Experts(spec.num_experts, chosen, tp * expert * itemsize) if spec.num_experts else None,
    )


def count_parameters(spec: ModelSpec) -> int:
    """Of the whole model, a tied head not counted again."""
    sizes = axis_sizes(spec)
    rows = [row for row in rows_of(spec.family) if not (spec.tie_embeddings and row.name == HEAD)]
    experts = spec.num_experts or 0
    return sum(_count(row, sizes) * _times(row, spec) * (experts if row.is_expert else 1) for row in rows)


def _pairs(length: int, seen: int) -> int:
    """Pairs of a query and a token before it, of which it sees at most the last `seen`."""
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _count(row: Row, sizes: dict[str, int]) -> int:
    return prod(row.stored_shape(sizes))


def _times(row: Row, spec: ModelSpec) -> int:
    """How many layers have the row."""
    if row.stage != "layer":
        return 1
    return sum(row in rows_of_layer((row,), spec, layer) for layer in range(spec.num_layers))
