"""Who owns which block. Integers only: the memory behind them is KVCache's."""

from __future__ import annotations

from collections import deque


class BlockPool:
    """`num_blocks` blocks of `block_size` slots, each free or owned by one or more sequences.

    Blocks are handed out in a fixed order (first freed, first reused), so equal runs get equal blocks.
    Raises ValueError for sizes below 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a cache of {num_blocks} blocks of {block_size} tokens holds nothing; make both 1 or more"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._owners = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody owns, shared ones counted once."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """A free block, now with one owner. The scheduler's reservations see to it that there is one."""
        assert self._free, f"all {self.num_blocks} blocks are in use; a reservation was too small"
        block = self._free.popleft()
        self._owners[block] = 1
        return block

    def share(self, blocks: list[int]) -> list[int]:
        """The same blocks for one more owner."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} is shared but nobody owns it"
            self._owners[block] += 1
        return list(blocks)

    def is_shared(self, block: int) -> bool:
        """True if writing to the block would disturb another owner."""
        return self._owners[block] > 1

    def release(self, blocks: list[int]) -> None:
        """One owner less for each block; those without owners are free again."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} is released but nobody owns it"
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
