"""How many blocks the cache of a rank has."""

from __future__ import annotations

import torch

from mindgen.config import EngineConfig, named
from mindgen.device import free_memory
from mindgen.engine.kv_cache import block_bytes
from mindgen.engine.request import MOST_SAMPLES
from mindgen.model.decoder import Decoder
from mindgen.parallel.world import World
from mindgen.spec import ModelSpec

MOST_SEQUENCES = MOST_SAMPLES  # in progress; a cache that holds this many of the longest is large enough
_SHARE_OF_CPU = 0.3  # of the free memory; the rest belongs to other programs
_SHARE_OF_DEVICE = 0.9


def check_asked(config: EngineConfig, device: torch.device, local_ranks: int) -> None:
    """ValueError for more memory than a CPU host has free: it is taken as it is written, and would fail only then."""
    asked = config.kv_cache_memory
    if asked is None or device.type != "cpu" or not config.use_kv_cache:
        return
    free = free_memory(device)
    if asked * 2**30 * local_ranks > free:
        of_ranks = f" on each of {local_ranks} ranks" if local_ranks > 1 else ""
        raise ValueError(
            f"{named('kv_cache_memory')} is {asked:g} GiB{of_ranks}, and this host has {free / 2**30:.2f} GiB of "
            f"memory free; lower it, or leave it out for {_SHARE_OF_CPU:g} of what is free"
        )


def num_blocks(config: EngineConfig, spec: ModelSpec, model: Decoder, world: World, local_ranks: int) -> int:
    """Sizes the pool by memory; all ranks take the smallest. ValueError if not one block fits. A collective."""
    bytes_each = block_bytes(model.num_layers, config.block_size, model.num_kv_heads, model.head_dim, model.dtype)
    room = cache_bytes(config, model.device.type, free_memory(model.device), local_ranks)
    mine = int(room // bytes_each)
    smallest = int(world.everyone.all_gather(torch.tensor([mine]), dim=0).min())
    if smallest < 1:
        raise ValueError(
            f"no room for one cache block of {config.block_size} tokens, {bytes_each / 2**20:.1f} MiB; "
            f"raise {named('kv_cache_memory')} or {named('kv_cache_fraction')}, or lower {named('block_size')}"
        )
    return min(smallest, most_used(config, spec))


def most_used(config: EngineConfig, spec: ModelSpec) -> int:
    """The blocks of as many sequences as there may be, each of the longest: more would stay empty."""
    return MOST_SEQUENCES * -(-spec.max_positions // config.block_size)


def cache_bytes(config: EngineConfig, kind: str, free: int, local_ranks: int) -> float:
    """What a rank's cache may take on a device of this kind (cpu, cuda or npu) with `free` bytes.

    Ranks of one host share its memory; every one of them has an accelerator of its own.
    """
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory * 2**30
    share = config.kv_cache_fraction or (_SHARE_OF_CPU if kind == "cpu" else _SHARE_OF_DEVICE)
    return free * share / (local_ranks if kind == "cpu" else 1)
