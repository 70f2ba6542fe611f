"""Where a rank stands. Numbers only: no processes, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """One rank's place among `tp * pp` ranks.

    Ranks are numbered as Megatron numbers them, tensor fastest: `rank = pp_rank * tp + tp_rank`. The `tp` ranks of a
    stage share out experts in `ep` groups of neighbours; the `tp / ep` ranks of a group share each of its experts.
    Raises ValueError when a size is below one or does not divide, or the rank lies outside the world.
    """

    rank: int = 0
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, size in (("tensor", self.tp), ("pipeline", self.pp), ("expert", self.ep)):
            if size < 1:
                raise ValueError(f"the {name} parallel size is {size}; it must be at least 1")
        if self.tp % self.ep:
            raise ValueError(
                f"expert parallel size {self.ep} must divide the tensor parallel size {self.tp}: experts are shared "
                "out among its ranks"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} lies outside tp {self.tp} x pp {self.pp} = {self.world_size} ranks;"
                f" ranks go from 0 to {self.world_size - 1}"
            )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def expert_tp(self) -> int:
        """How many ranks share an expert."""
        return self.tp // self.ep

    @property
    def expert_tp_rank(self) -> int:
        """My number among the ranks that share my experts."""
        return self.tp_rank % self.expert_tp

    @property
    def ep_rank(self) -> int:
        """The number of the group that has my experts."""
        return self.tp_rank // self.expert_tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def tp_ranks(self) -> tuple[int, ...]:
        """World ranks of my stage, in tensor order."""
        first = self.pp_rank * self.tp
        return tuple(range(first, first + self.tp))

    @property
    def pp_ranks(self) -> tuple[int, ...]:
        """World ranks that share my tensor rank, in stage order."""
        return tuple(range(self.tp_rank, self.world_size, self.tp))


SINGLE = Topology()


def split_layers(num_layers: int, pp: int, layer_list: Sequence[int] | None = None) -> tuple[range, ...]:
    """The global layer numbers of every pipeline stage, in stage order.

    Without `layer_list` the split is even. Layers left over go, one each, to the middle stages from the front,
    then to the first stage, which holds the embedding; never to the last, which also does the head and the sampling.
    `layer_list` gives the number of layers of each stage instead. Raises ValueError when the numbers do not fit.
    """
    counts = tuple(layer_list) if layer_list is not None else _even_counts(num_layers, pp)
    _check_counts(counts, num_layers, pp)
    starts = [sum(counts[:stage]) for stage in range(pp)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def _even_counts(num_layers: int, pp: int) -> tuple[int, ...]:
    if pp < 1:
        raise ValueError(f"the pipeline parallel size is {pp}; it must be at least 1")
    if pp > num_layers:
        raise ValueError(
            f"{num_layers} layers cannot fill {pp} pipeline stages; choose a pipeline size of at most {num_layers}"
        )
    base, left_over = divmod(num_layers, pp)
    order = [*range(1, pp - 1), 0]  # who takes one more; the last stage never does
    favoured = set(order[:left_over])
    return tuple(base + (stage in favoured) for stage in range(pp))


def _check_counts(counts: tuple[int, ...], num_layers: int, pp: int) -> None:
    given = ",".join(str(count) for count in counts)
    if len(counts) != pp:
        raise ValueError(f"the layer list {given} has {len(counts)} entries for {pp} pipeline stages; give one a stage")
    if any(count < 1 for count in counts):
        raise ValueError(f"the layer list {given} leaves a stage without layers; every entry must be at least 1")
    if sum(counts) != num_layers:
        raise ValueError(f"the layer list {given} sums to {sum(counts)}, but the model has {num_layers} layers")
