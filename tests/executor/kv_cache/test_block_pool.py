"""BlockPool against a plain model of its books."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamella_executor.kv_cache import BlockPool

picks = st.integers(0, 27719)  # taken modulo the number of candidates


def pick(candidates: list[int], which: int) -> int:
    return candidates[which % len(candidates)]


class BlockPoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 12))
    def make(self, num_blocks: int) -> None:
        self.evicted: list[int] = []
        self.pool = BlockPool(num_blocks, on_evict=self.evicted.append)
        self.refs = [0] * num_blocks
        self.cacheable: set[int] = set()
        self.lru: list[int] = []  # oldest first

    def live(self) -> list[int]:
        return [block for block, refs in enumerate(self.refs) if refs]

    @rule()
    def take(self) -> None:
        num_free = len(self.refs) - len(self.live()) - len(self.lru)
        if not num_free and not self.lru:
            with pytest.raises(RuntimeError, match="are live"):
                self.pool.take()
            return
        self.evicted.clear()
        block = self.pool.take()
        assert self.refs[block] == 0
        if num_free:
            assert not self.evicted and block not in self.lru
        else:
            assert self.evicted == [block] == [self.lru.pop(0)]
            self.cacheable.remove(block)
        self.refs[block] = 1

    @precondition(lambda self: self.live() or self.lru)
    @rule(which=picks)
    def share(self, which: int) -> None:
        block = pick(self.live() + self.lru, which)
        self.pool.share(block)
        self.refs[block] += 1
        if block in self.lru:
            self.lru.remove(block)

    @precondition(lambda self: self.live())
    @rule(which=picks)
    def release(self, which: int) -> None:
        block = pick(self.live(), which)
        self.pool.release(block)
        self.refs[block] -= 1
        if not self.refs[block] and block in self.cacheable:
            self.lru.append(block)

    @precondition(lambda self: self.live())
    @rule(which=picks)
    def mark(self, which: int) -> None:
        block = pick(self.live(), which)
        self.pool.mark_cacheable(block)
        self.cacheable.add(block)

    @precondition(lambda self: self.cacheable)
    @rule(which=picks)
    def unmark(self, which: int) -> None:
        block = pick(sorted(self.cacheable), which)
        self.pool.unmark_cacheable(block)
        self.cacheable.remove(block)
        if block in self.lru:
            self.lru.remove(block)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        assert (self.pool.num_live, self.pool.num_cached) == (len(self.live()), len(self.lru))
        assert self.pool.num_live + self.pool.num_cached + self.pool.num_free == len(self.refs)
        assert self.pool.num_available == self.pool.num_free + self.pool.num_cached
        assert [self.pool.refs(b) for b in range(len(self.refs))] == self.refs


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=120, stateful_step_count=100, deadline=None)


def test_misuse_is_an_error_not_a_leak() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(RuntimeError, match="released more often"):
        pool.release(block)
    with pytest.raises(RuntimeError, match="is free"):
        pool.share(block)
    with pytest.raises(RuntimeError, match="not live"):
        pool.mark_cacheable(block)
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(0)
    pool.check_invariants()


@pytest.mark.parametrize("damage", ["lost", "twice", "both"])
def test_broken_books_are_noticed(damage: str) -> None:
    pool = BlockPool(3)
    block = pool.take()
    if damage == "lost":
        pool._refs[block] = 0
    elif damage == "twice":
        pool._free.append(pool._free[0])
    else:
        pool._free.append(block)
    with pytest.raises(RuntimeError, match="KV block"):
        pool.check_invariants()
