"""One row per parameter, and all that follows from it: shapes, shards, packing, where to all-reduce.

    HF tensors --pack--> full logical array --shard--> local logical array --stored--> what disk and device hold

Axes are named. `|` separates the two stored dimensions; a row without it is a vector. The Megatron names are those of
megatron-core's GPT model with the local layer specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from mindgen.parallel.topology import Topology, split_layers
from mindgen.spec import ModelSpec

Stage = Literal["first", "layer", "last"]
Read = Callable[[int, int], Tensor]  # (start, stop) of the split axis -> logical array; the bounds are 0, 1 without one

# How many entries of the packed axis each Hugging Face tensor brings; a name stands for the size of that axis.
PACKS: dict[str, tuple[str | int, ...]] = {"qkv": ("q", 1, 1), "gate_up": (1, 1)}


@dataclass(frozen=True)
class Row:
    """One parameter.

    name: Megatron's name; `{layer}` stands for the layer's number within its stage.
    axes: the logical axes in stored order, e.g. `group qkv head_dim | hidden`.
    hf: the Hugging Face tensors it is packed from, in order; `{layer}` is the global number.
    split: the axis that tensor parallelism divides, or None for a replicated parameter.
    pack: the axis along which the Hugging Face tensors lie side by side, a key of PACKS.
    stage: `first`, `layer` or `last`: which pipeline stages hold it.
    """

    name: str
    axes: str
    hf: tuple[str, ...]
    split: str | None = None
    pack: str | None = None
    stage: Stage = "layer"

    def __post_init__(self) -> None:
        assert self.split is None or self.split in self.names, f"{self.name}: no axis {self.split}"
        assert len(self.hf) == (len(PACKS[self.pack]) if self.pack else 1), f"{self.name}: {self.hf}"

    @property
    def names(self) -> tuple[str, ...]:
        """The axes in order, without the bar."""
        return tuple(name for name in self.axes.split() if name != "|")

    @property
    def splits_input(self) -> bool:
        """True if the split axis is right of the bar: outputs are partial sums, which an all-reduce completes."""
        return self.split is not None and "|" in self.axes and self.split in self.axes.split("|")[1].split()

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The logical shape under `sizes`."""
        return tuple(sizes[name] for name in self.names)

    def stored_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape on disk and device: the axes left and right of the bar multiplied up."""
        return tuple(prod(sizes[name] for name in side.split()) for side in self.axes.split("|"))

    def stored(self, logical: Tensor) -> Tensor:
        """A logical array as it is stored."""
        left = len(self.axes.split("|")[0].split())
        shape = [prod(logical.shape[:left])] + ([prod(logical.shape[left:])] if "|" in self.axes else [])
        return logical.reshape(shape)

    def pieces(self, sizes: dict[str, int]) -> Iterator[tuple[str, dict[str, int], int]]:
        """For each Hugging Face tensor: its name, the sizes of its axes, and its offset on the packed axis."""
        if self.pack is None:
            yield self.hf[0], sizes, 0
            return
        offset = 0
        for name, part in zip(self.hf, PACKS[self.pack], strict=True):
            size = sizes[part] if isinstance(part, str) else part
            yield name, sizes | {self.pack: size}, offset
            offset += size

    def join(self, pieces: list[Tensor]) -> Tensor:
        """Logical pieces of the Hugging Face tensors, in order, as one logical array (`pack` of section 4)."""
        return pieces[0] if self.pack is None else torch.cat(pieces, dim=self.names.index(self.pack))

    def unpack(self, logical: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
        """A logical array as the Hugging Face tensors it is packed from."""
        parts = {}
        for name, piece_sizes, offset in self.pieces(sizes):
            piece = logical
            if self.pack is not None:
                piece = logical.narrow(self.names.index(self.pack), offset, piece_sizes[self.pack])
            parts[name] = self.stored(piece)
        return parts


def axis_sizes(spec: ModelSpec, vocab: int | None = None) -> dict[str, int]:
    """The size of every axis of the whole model; `vocab` is the padded size where a layout pads it."""
    queries = spec.num_heads // spec.num_kv_heads
    return {
        "hidden": spec.hidden_size,
        "ffn": spec.ffn_size,
        "gate_up": 2,
        "group": spec.num_kv_heads,
        "q": queries,
        "qkv": queries + 2,
        "head_dim": spec.head_dim,
        "vocab": spec.vocab_size if vocab is None else vocab,
    }


def local_sizes(spec: ModelSpec, tp: int) -> dict[str, int]:
    """The size of every axis on one tensor rank; each replicated KV head counts as a group of its own."""
    sizes = axis_sizes(spec, padded_vocab(spec.vocab_size, tp))
    groups = max(spec.num_kv_heads, tp)
    queries = spec.num_heads // groups
    sizes |= {"group": groups // tp, "q": queries, "qkv": queries + 2}
    return sizes | {"ffn": sizes["ffn"] // tp, "vocab": sizes["vocab"] // tp}


def padded_vocab(vocab_size: int, tp: int, divisor: int = 1) -> int:
    """Megatron's rule: the next multiple of divisor x tp."""
    multiple = divisor * tp
    return -(-vocab_size // multiple) * multiple


def check_divides(spec: ModelSpec, tp: int) -> None:
    """Raises ValueError naming every size that `tp` ranks cannot share, and the sizes that work."""
    if _problems(spec, tp):
        fitting = [str(n) for n in range(1, spec.num_heads + 1) if not _problems(spec, n)]
        raise ValueError(
            f"tensor parallel size {tp} does not fit this model: {'; '.join(_problems(spec, tp))}. "
            f"Sizes that fit: {', '.join(fitting)}"
        )


def _problems(spec: ModelSpec, tp: int) -> list[str]:
    problems = []
    if spec.num_heads % tp:
        problems.append(f"{spec.num_heads} attention heads are not divisible by {tp}")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        problems.append(f"{spec.num_kv_heads} KV heads can be neither split nor replicated evenly")
    if spec.ffn_size % tp:
        problems.append(f"ffn size {spec.ffn_size} is not divisible by {tp}")
    return problems


def shard(row: Row, read: Read, spec: ModelSpec, rank: int, tp: int) -> Tensor:
    """What tensor rank `rank` of `tp` holds of a row at run time, as stored.

    `read(start, stop)` gives the logical array between two bounds of the split axis; nothing else is read. With fewer
    KV heads than ranks, neighbouring ranks hold the same K and V heads and share out that group's query heads.
    """
    if row.split is None:
        return row.stored(read(0, 1))
    size = axis_sizes(spec, padded_vocab(spec.vocab_size, tp))[row.split]
    if row.split == "group" and size < tp:
        return row.stored(_share_of_group(row, read, spec, rank, tp))
    each = size // tp
    return row.stored(read(rank * each, (rank + 1) * each))


def _share_of_group(row: Row, read: Read, spec: ModelSpec, rank: int, tp: int) -> Tensor:
    sharers = tp // spec.num_kv_heads
    group, part = divmod(rank, sharers)
    logical = read(group, group + 1)
    queries = spec.num_heads // spec.num_kv_heads
    each = queries // sharers
    axis = row.names.index("qkv" if "qkv" in row.names else "q")
    share = logical.narrow(axis, part * each, each)
    return torch.cat([share, logical.narrow(axis, queries, 2)], dim=axis) if "qkv" in row.names else share


@dataclass(frozen=True)
class Parameter:
    """A row at its place: `name` in this stage's model, `layer` its global number (None outside the layers)."""

    name: str
    row: Row
    layer: int | None


def parameters(
    rows: tuple[Row, ...], spec: ModelSpec, topology: Topology, layer_list: tuple[int, ...] | None = None
) -> Iterator[Parameter]:
    """The parameters of one pipeline stage in model order, with stage-local layer numbers as Megatron counts them.

    A tied head is not a parameter of a model with one stage; the last of several stages holds a copy of the embedding.
    """
    if topology.is_first_stage:
        yield from (Parameter(row.name, row, None) for row in rows if row.stage == "first")
    layers = split_layers(spec.num_layers, topology.pp, layer_list)[topology.pp_rank]
    for local, layer in enumerate(layers):
        yield from (Parameter(row.name.format(layer=local), row, layer) for row in rows if row.stage == "layer")
    if topology.is_last_stage:
        tied = spec.tie_embeddings and topology.pp == 1
        yield from (
            Parameter(row.name, row, None) for row in rows if row.stage == "last" and not (tied and row.name == HEAD)
        )


HEAD = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
