"""Who owns which block, and which content is still there, against a plain model of both."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mindgen.engine.blocks import BlockPool, content_key

KEYS = [content_key(b"", [number]) for number in range(6)]


class Pool(RuleBasedStateMachine):
    """Any order of what a pool can do, against a list of who holds what and a list of contents, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.holdings: list[list[int]] = []
        self.known: dict[bytes, int] = {}
        self.left: list[int] = []  # blocks without owner whose content is known, the one left longest ago first

    @initialize(reuse=st.booleans())
    def start(self, reuse: bool) -> None:
        self.pool = BlockPool(5, 4, reuse)

    def owners(self, block: int) -> int:
        return sum(block in held for held in self.holdings)

    @precondition(lambda self: self.pool.num_available)
    @rule()
    def allocate(self) -> None:
        evicted = self.left[0] if self.left and self.pool.num_available == len(self.left) else None
        block = self.pool.allocate()
        assert not self.owners(block) and (block == evicted or block not in self.left)
        self.holdings.append([block])
        if evicted is not None:
            self.left.remove(block)
            self.known = {key: other for key, other in self.known.items() if other != block}

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        self.holdings.append(self.pool.share(data.draw(st.sampled_from(self.holdings))))

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = self.holdings.pop(data.draw(st.integers(0, len(self.holdings) - 1)))
        self.pool.release(held)
        for block in held:
            self.leave(block)

    def leave(self, block: int) -> None:
        if self.owners(block) or block not in self.known.values():
            return
        if self.pool.reuse:
            self.left.append(block)
        else:
            self.known = {key: other for key, other in self.known.items() if other != block}

    @precondition(lambda self: self.holdings)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        held = data.draw(st.sampled_from(self.holdings))
        (block,) = held
        if self.owners(block) > 1 or block in self.known.values():
            return  # nobody publishes what is shared, or twice
        held[0] = self.pool.publish(block, key)
        assert held[0] == self.known.setdefault(key, block)
        self.left = [other for other in self.left if other != held[0]]

    @rule(key=st.sampled_from(KEYS))
    def find(self, key: bytes) -> None:
        assert self.pool.is_used(key) == (key in self.known and self.owners(self.known[key]) > 0)
        block = self.pool.find(key)
        assert block == self.known.get(key)
        if block is not None:
            self.holdings.append([block])
            self.left = [other for other in self.left if other != block]

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, held = self.pool, {block for blocks in self.holdings for block in blocks}
        assert (pool.num_used, pool.num_cached) == (len(held), len(self.left))
        assert all(pool.num_owners(block) == self.owners(block) for block in range(5))
        assert all(pool.is_shared(block) == (self.owners(block) > 1) for block in held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


def test_releasing_twice_is_a_bug_of_ours():
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])
    with pytest.raises(AssertionError):
        pool.share([block])


def test_what_was_left_longest_ago_goes_first_and_only_when_nothing_is_free():
    pool = BlockPool(3, 4)
    first, second = (pool.publish(pool.allocate(), key) for key in KEYS[:2])
    pool.release([second, first])
    assert (pool.num_available, pool.num_cached) == (3, 2)
    assert pool.allocate() not in (first, second)
    assert pool.allocate() == second
    assert pool.find(KEYS[1]) is None and pool.find(KEYS[0]) == first


def test_a_key_stands_for_all_that_came_before():
    keys = {content_key(before, tokens) for before in KEYS[:2] for tokens in ([1, 2], [2, 1], [1], [258])}
    assert len(keys) == 8
    assert content_key(KEYS[0], (1, 2)) in keys
