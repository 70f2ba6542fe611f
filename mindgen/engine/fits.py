"""Whether a request could be served at all, if nobody else were there."""

from __future__ import annotations

from mindgen.engine.blocks import BlockPool
from mindgen.engine.request import Request


def check_fits(
    request: Request, pool: BlockPool | None, max_sequences: int, max_batch_tokens: int, max_positions: int | None
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
            "tokens; lower num_beams or raise max_batch_tokens"
        )
    if pool and (need := most_blocks(request, pool)) > pool.num_blocks:
        beams = f" in {params.num_beams} beams" if params.num_beams > 1 else ""
        raise ValueError(
            f"{size}{beams}, which takes {need} blocks of {pool.block_size} tokens, but the cache has "
            f"{pool.num_blocks}; lower max_new_tokens or num_beams, shorten the prompt, or enlarge the cache"
        )


def most_blocks(request: Request, pool: BlockPool) -> int:
    """The blocks for its longest answer, whose last token needs no place.

    Samples can take turns. Beams cannot, but share the full blocks of the prompt.
    """
    params, num_prompt = request.params, len(request.prompt)
    total = pool.blocks_for(num_prompt + params.max_new_tokens - 1)
    shared = min(total, num_prompt // pool.block_size)
    return shared + params.num_beams * (total - shared)
