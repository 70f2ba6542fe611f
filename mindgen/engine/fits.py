"""Whether a request could be served at all, if nobody else were there."""

from __future__ import annotations

from dataclasses import dataclass

from mindgen.config import named
from mindgen.engine.blocks import BlockPool
from mindgen.engine.request import Request


@dataclass(frozen=True)
class Sight:
    """What of a sequence must be in the cache, where each token sees only the last `window`, itself included, and a
    step computes at most `max_chunk` tokens."""

    window: int
    max_chunk: int

    def most_blocks(self, pool: BlockPool) -> int:
        """The blocks that one sequence has at most: those that its chunk and the window before it touch."""
        return pool.blocks_for(self.window + self.max_chunk - 2) + 1


def check_fits(
    request: Request,
    pool: BlockPool | None,
    max_sequences: int,
    max_batch_tokens: int,
    max_positions: int | None,
    sight: Sight | None = None,
) -> None:
    """ValueError, with the numbers, for a request that would never end within these limits of a scheduler."""
    params, num_prompt = request.params, len(request.prompt)
    size = f"request {request.id} has {num_prompt} prompt tokens and may generate {params.max_new_tokens}"
    total = num_prompt + params.max_new_tokens
    if max_positions and total > max_positions:
        raise ValueError(
            f"{size}, together {total}, but the model's context is {max_positions}; "
            f"shorten the prompt or set max_new_tokens to {max(0, max_positions - num_prompt)} or less"
        )
    width = max(params.num_drawn, params.num_beams)
    if width > max_sequences:
        raise ValueError(
            f"request {request.id} wants {width} sequences at once, but at most {max_sequences} run together; "
            "lower n or num_beams, or raise max_sequences"
        )
    if params.num_beams > max_batch_tokens:
        raise ValueError(
            f"request {request.id} has {width} beams, which share a step, but a step takes {max_batch_tokens} "
            f"tokens; lower num_beams or raise {named('max_batch_tokens')}"
        )
    if pool and (need := most_blocks(request, pool, sight)) > pool.num_blocks:
        beams, fewer = (f" in {params.num_beams} beams", " or num_beams") if params.num_beams > 1 else ("", "")
        raise ValueError(
            f"{size}{beams}, which takes {need} blocks of {pool.block_size} tokens, but the cache has "
            f"{pool.num_blocks}; lower max_new_tokens{fewer}, shorten the prompt, or raise "
            f"{named('kv_cache_memory')}"
        )


def most_blocks(request: Request, pool: BlockPool, sight: Sight | None = None) -> int:
    """The blocks for its longest answer, whose last token needs no place.

    Samples can take turns, and give back what is out of sight. Beams do neither, but share the full blocks of the
    prompt.
    """
    params, num_prompt = request.params, len(request.prompt)
    total = pool.blocks_for(num_prompt + params.max_new_tokens - 1)
    if sight and params.num_beams == 1:
        return min(total, sight.most_blocks(pool))
    shared = min(total, num_prompt // pool.block_size)
    return shared + params.num_beams * (total - shared)


def blocks_at_once(request: Request, count: int, pool: BlockPool, sight: Sight | None = None) -> int:
    """The blocks with which `count` such requests, no two of which begin alike, run at once and to their ends.

    The scheduler admits nobody before each of those who run could have one more block than its prompt takes.
    """
    most = most_blocks(request, pool, sight)
    prompt = min(most, pool.blocks_for(len(request.prompt)))
    return max(count * most, count * prompt + count - 1)
