"""How a Megatron directory holds experts, whoever wrote it: under which names, and which shard has which part of which.

Megatron's sequential layers have a tensor for each expert and so have those of Transformer Engine, under other names
(shards.py). Its older grouped layers have two tensors for all experts of a shard, `weight1` and `weight2`, in which
the experts lie one after the other, each transposed, whatever the stated shape.

Experts lie in blocks of neighbours. Expert rank e of Megatron holds block e, whose experts the tensor ranks share,
all of them or `expert_tensor_parallel_size`; with MindSpeed-LLM's --moe-tp-extend-ep every tensor rank has a block of
its own, number e * tp + tensor rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mindgen.spec import ModelSpec
from mindgen.weights.megatron_directory import Grid, Place
from mindgen.weights.shards import Shard, Tensors

_GROUPED = {"weight1": "linear_fc1.weight", "weight2": "linear_fc2.weight"}
_GROUPED_NAME = re.compile(r"(.*\.mlp\.experts\.)(weight1|weight2)")
_LOCAL_NAME = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")


def general_name(name: str) -> str:
    """The name of a tensor of an expert, or of all, with `{expert}` for the number; other names as they are."""
    if match := _GROUPED_NAME.fullmatch(name):
        return f"{match[1]}local_experts.{{expert}}.{_GROUPED[match[2]]}"
    match = _LOCAL_NAME.fullmatch(name)
    return f"{match[1]}{{expert}}{match[3]}" if match else name


def grouped_name(name: str) -> str:
    """The name of the tensor with all of a shard's experts, for one of them; other names as they are."""
    match = _LOCAL_NAME.fullmatch(name)
    word = next((word for word, of in _GROUPED.items() if match and match[3] == f".{of}"), None)
    return f"{match[1].removesuffix('local_experts.')}{word}" if match and word else name


def grouped_shape(name: str, shape: tuple[int, ...], each: int) -> tuple[int, int]:
    """The shape of a grouped tensor, of `each` experts whose tensors are of `shape`."""
    outputs, inputs = shape
    return (inputs, each * outputs) if name.endswith("weight1") else (each * inputs, outputs)


def grouped(experts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Experts as they lie in a grouped tensor of `shape`."""
    return torch.cat([expert.t().reshape(-1) for expert in experts]).view(shape)


@dataclass(frozen=True)
class ExpertLayout:
    """Which shards hold which parts of which experts.

    tp: how many shards share an expert. each: experts of a block. holders: by block and part, the tensor and expert
    rank of a shard that has it; some have the same. has_blocks_by_tensor_rank: every tensor rank has its own block.
    """

    tp: int
    each: int
    holders: dict[tuple[int, int], tuple[int, int]]
    has_blocks_by_tensor_rank: bool = False

    def local(self, expert: int | None) -> int | None:
        """An expert's number in its block."""
        return None if expert is None else expert % self.each

    def holder(self, expert: int, part: int) -> tuple[int, int]:
        """Tensor and expert rank of a shard that has a part of an expert."""
        return self.holders[expert // self.each, part]

    def experts_of(self, block: int) -> range:
        """The experts of a block."""
        return range(block * self.each, (block + 1) * self.each)


NO_EXPERTS = ExpertLayout(1, 0, {})  # or not known yet


def find_expert_layout(spec: ModelSpec, grid: Grid, shard: Shard, flags: dict[str, Any]) -> ExpertLayout:
    """The layout, from the shapes in a `shard` that has experts. What shapes leave open, of grouped experts with and
    without --moe-tp-extend-ep, the shard's args or the given flag say.

    Raises ValueError if the shapes fit no layout, or some part is nowhere.
    """
    count, width = spec.num_experts or 1, spec.expert_ffn_size or 1
    extends = bool(shard.args.get("moe_tp_extend_ep") or flags.get("--moe-tp-extend-ep"))
    each, found = _stored_sizes(shard, count // (grid.ep * (grid.tp if extends else 1)))
    if not each or count % each or not found or width % found:
        raise ValueError(f"{shard.path} holds {each} experts of size {found}; the model has {count} of {width}")
    blocks, tp = count // each, width // found
    extended = blocks == grid.ep * grid.tp != grid.ep
    if (blocks != grid.ep and not extended) or grid.tp % tp or (extended and tp > 1):
        raise ValueError(
            f"{shard.path} holds {each} of {count} experts, each shared by {tp} ranks; that is no way in which "
            f"tensor parallel size {grid.tp} and expert parallel size {grid.ep} divide them"
        )
    stated = shard.args.get("expert_tensor_parallel_size")
    if stated not in (None, tp) and not extended:
        raise ValueError(f"{shard.path} shares an expert among {tp} ranks; its args say {stated}")
    return _with_holders(ExpertLayout(tp, each, {}, extended), grid, blocks)


def block_of(layout: ExpertLayout, grid: Grid, place: Place) -> int:
    """The block whose experts a shard holds."""
    return place.expert * grid.tp + place.rank if layout.has_blocks_by_tensor_rank else place.expert


def _with_holders(layout: ExpertLayout, grid: Grid, blocks: int) -> ExpertLayout:
    holders: dict[tuple[int, int], tuple[int, int]] = {}
    for place in grid.files:
        holders.setdefault((block_of(layout, grid, place), place.rank % layout.tp), (place.rank, place.expert))
    missing = {(block, part) for block in range(blocks) for part in range(layout.tp)} - holders.keys()
    if missing:
        block, part = min(missing)
        experts = layout.experts_of(block)
        raise ValueError(
            f"{grid.folder} lacks the shards with part {part + 1} of {layout.tp} of the experts {experts.start} to "
            f"{experts.stop - 1}"
        )
    return replace(layout, holders=holders)


def _stored_sizes(shard: Shard, each_if_grouped: int) -> tuple[int, int]:
    """How many experts a shard has, and the size of its part of them; zeros where that cannot be told."""
    for name in shard.names:
        match = _GROUPED_NAME.fullmatch(name)
        if match and match[2] == "weight2":
            rows = shard.describe(name)[0][0]
            fits = each_if_grouped and rows % each_if_grouped == 0
            return (each_if_grouped, rows // each_if_grouped) if fits else (0, 0)
    found = [match for match in map(_LOCAL_NAME.fullmatch, shard.names) if match]
    numbers = {int(match[2]) for match in found if match[1] == found[0][1]}
    second = next((match[0] for match in found if match[3] == ".linear_fc2.weight"), None)
    shape = shard.describe(second)[0] if second else ()
    return (len(numbers), shape[1]) if len(shape) == 2 else (0, 0)


def has_experts(names: Iterable[str]) -> bool:
    """Whether there is an expert among tensors."""
    return any(general_name(name) != name for name in names)


def one_by_one(shard: Shard, each: int) -> Shard:
    """A shard with its grouped experts, `each` in a tensor, under the names of single ones; as it is for none."""
    if not each or not any(map(_GROUPED_NAME.fullmatch, shard.names)):
        return shard
    names: dict[str, str] = {}
    for name, stored in shard.names.items():
        if _GROUPED_NAME.fullmatch(name):
            names |= {general_name(name).format(expert=number): f"{stored}[{number}]" for number in range(each)}
        else:
            names[name] = stored
    return replace(shard, names=names, tensors=_Ungrouped(shard.tensors, each))


class _Ungrouped:
    """Grouped tensors as those of single experts, by the names `stored[number]`."""

    def __init__(self, tensors: Tensors, each: int):
        self._tensors = tensors
        self._each = each

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        stored, number = _taken_apart(name)
        shape, dtype = self._tensors.describe(stored)
        return (shape if number is None else self._transposed(stored, shape)[::-1]), dtype

    def slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        stored, number = _taken_apart(name)
        if number is None:
            return self._tensors.slice(stored, dim, start, stop)
        return self._expert(stored, number).t().narrow(dim, start, stop - start)

    def _transposed(self, stored: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of one expert as it lies there, inputs x outputs."""
        if len(shape) != 2 or shape[stored.endswith("weight1")] % self._each:
            raise ValueError(f"{stored} is {list(shape)}, which does not hold {self._each} experts")
        rows, columns = shape
        return (rows, columns // self._each) if stored.endswith("weight1") else (rows // self._each, columns)

    def _expert(self, stored: str, number: int) -> Tensor:
        """One expert, of whose tensor only the rows are read between which it lies, whatever the stated shape."""
        shape, _ = self._tensors.describe(stored)
        inputs, outputs = self._transposed(stored, shape)
        start, stop = number * inputs * outputs, (number + 1) * inputs * outputs
        first, last = start // shape[1], -(-stop // shape[1])
        rows = self._tensors.slice(stored, 0, first, last).reshape(-1)
        return rows.narrow(0, start - first * shape[1], stop - start).view(inputs, outputs)


def _taken_apart(name: str) -> tuple[str, int | None]:
    stored, bracket, number = name.partition("[")
    return stored, int(number[:-1]) if bracket else None
