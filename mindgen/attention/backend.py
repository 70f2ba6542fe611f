"""What an attention backend is, and which one runs.

T tokens of the batch, S sequences, H query heads, G KV heads, D head_dim, all on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:  # the engine stands above attention: only the shapes of its values are known here
    from mindgen.engine.batch import Batch
    from mindgen.engine.kv_cache import KVCache


class AttentionContext(Protocol):
    """One batch made ready for all layers. positions: [T] of the batch's tokens."""

    @property
    def positions(self) -> Tensor: ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of one layer, the new keys and values stored first.

        `layer` counts within the stage. query [T, H, D], key and value [T, G, D] -> [T, H, D]; scaled by D ** -0.5.
        """
        ...


class AttentionBackend(Protocol):
    """Makes contexts; `name` is what `--attention` calls it."""

    name: str

    def prepare(self, batch: Batch, cache: KVCache | None) -> AttentionContext:
        """`cache` None is the recomputing twin: every sequence brings all its tokens, and nothing is stored."""
        ...


BACKENDS = ("sdpa", "reference")  # `auto` takes the first


def choose_backend(name: str, window: int | None) -> AttentionBackend:
    """The backend called `name`; `auto` is the first of BACKENDS, which runs on every device that torch knows.

    `window` is the model's sliding window in tokens, or None. Raises ValueError for an unknown name.
    """
    from mindgen.attention.reference import ReferenceAttention
    from mindgen.attention.sdpa import SdpaAttention

    classes: dict[str, Callable[[int | None], AttentionBackend]] = {
        "sdpa": SdpaAttention,
        "reference": ReferenceAttention,
    }
    if name == "auto":
        name = BACKENDS[0]
    if name not in classes:
        raise ValueError(f"unknown attention backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    return classes[name](window)
