"""KvCacheManager: every visible position reads what was computed for it, whatever is shared, copied or evicted."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamella_executor.kv_cache import KvCacheManager
from lamella_executor.sequence import EVICTED_BLOCK, Sequence

POISON = -1
picks = st.integers(0, 839)  # taken modulo the number of candidates


def make_sequence(tokens: list[int]) -> Sequence:
    return Sequence(index=0, token_ids=list(tokens), num_prompt_tokens=len(tokens))


def family_tokens(family: int, num_common: int, num_own: int, own: int) -> list[int]:
    return [10 * family + i % 7 for i in range(num_common)] + [100 + own + i for i in range(num_own)] or [1]


class ManagerMachine(RuleBasedStateMachine):
    """Steps as the scheduler makes them: starts, allocations and frees in any order, then one forward."""

    @initialize(
        num_blocks=st.integers(2, 20),
        size=st.sampled_from([1, 2, 4, 8]),
        reuse=st.sampled_from([True, True, True, False]),
        partial=st.booleans(),
        window=st.one_of(st.none(), st.none(), st.integers(1, 12)),
        sinks=st.integers(0, 4),
    )
    def make(self, num_blocks: int, size: int, reuse: bool, partial: bool, window: int | None, sinks: int) -> None:
        self.kv = KvCacheManager(
            num_blocks,
            size,
            enable_block_reuse=reuse,
            enable_partial_reuse=partial,
            window=window,
            num_sinks=sinks,
        )
        self.size, self.window, self.sinks = size, window, sinks
        self.contents: list[list[int | None]] = [[None] * size for _ in range(num_blocks)]
        self.sequences: list[Sequence] = []
        self.plan: dict[Sequence, int] = {}  # -> tokens to compute in this step
        self.has_copies = False

    def pick(self, which: int) -> Sequence:
        return self.sequences[which % len(self.sequences)]

    @precondition(lambda self: len(self.sequences) < 8)
    @rule(family=st.integers(0, 1), num_common=st.integers(0, 20), num_own=st.integers(0, 6), own=st.integers(0, 1))
    def start(self, family: int, num_common: int, num_own: int, own: int) -> None:
        sequence = make_sequence(family_tokens(family, num_common, num_own, own))
        match = self.kv.match_prefix(sequence)
        assert match.num_tokens < sequence.num_tokens
        available = self.kv.num_available
        if match.num_held + (match.head_source != EVICTED_BLOCK) > available:
            self.kv.free(sequence)  # looked up but not started
            return
        self.kv.attach(sequence, match)
        needed = self.kv.blocks_for(sequence.num_tokens) - len(sequence.blocks)
        if match.head_source != EVICTED_BLOCK:
            assert needed <= self.kv.num_available, "the copied head left too little for the rest"
            self.has_copies = True
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(which=picks, num_tokens=st.integers(1, 12))
    def allocate(self, which: int, num_tokens: int) -> None:
        sequence = self.pick(which)
        num_tokens = min(num_tokens, sequence.num_tokens - sequence.num_computed_tokens)
        before = list(sequence.blocks)
        if self.kv.allocate(sequence, sequence.num_computed_tokens + num_tokens):
            self.plan[sequence] = num_tokens
            self.has_copies = True
        else:
            assert sequence.blocks == before

    @precondition(lambda self: self.sequences)
    @rule(which=picks, cache=st.booleans(), is_paused=st.booleans())
    def free(self, which: int, cache: bool, is_paused: bool) -> None:
        sequence = self.pick(which)
        if not cache:
            others = {b for s in self.sequences if s is not sequence for b in s.blocks}
            for block in set(sequence.blocks) - others - set(self.kv._copies._pins) - {EVICTED_BLOCK}:
                self.contents[block] = [POISON] * self.size
        self.kv.free(sequence, cache=cache)
        self.kv.free(sequence)
        assert not sequence.blocks and not sequence.num_computed_tokens
        self.plan.pop(sequence, None)
        if not is_paused:
            self.sequences.remove(sequence)

    @precondition(lambda self: self.sequences and not self.plan and not self.has_copies and len(self.sequences) < 8)
    @rule(which=picks, token=st.integers(0, 2))
    def fork(self, which: int, token: int) -> None:
        parent = self.pick(which)
        child = parent.fork(1)
        self.kv.fork(parent, child)
        child.token_ids.append(200 + token)
        self.sequences.append(child)

    @precondition(lambda self: not self.plan and not self.has_copies)
    @rule(which=picks)
    def share_prefix(self, which: int) -> None:
        empty = [s for s in self.sequences if not s.blocks]
        started = [s for s in self.sequences if s.num_computed_tokens]
        if not empty or not started:
            return
        sequence, source = empty[which % len(empty)], started[which % len(started)]
        limit = min(source.num_computed_tokens, sequence.num_tokens - 1)
        common = 0
        while common < limit and source.token_ids[common] == sequence.token_ids[common]:
            common += 1
        if common and self.kv.share_prefix(source, sequence, common):
            self.check_reads(sequence, common, common)

    @rule()
    def forward(self) -> None:
        copies = self.kv.take_copies()
        destinations = [destination for _, destination in copies]
        assert len(set(destinations)) == len(destinations)
        assert not set(destinations) & {source for source, _ in copies}
        for source, destination in reversed(copies):
            self.contents[destination] = list(self.contents[source])
        for sequence, num_tokens in self.plan.items():
            start = sequence.num_computed_tokens
            for position in range(start, start + num_tokens):
                self.contents[sequence.blocks[position // self.size]][position % self.size] = self.truth(
                    sequence, position
                )
        for sequence, num_tokens in self.plan.items():
            start = sequence.num_computed_tokens
            self.check_reads(sequence, start, start + num_tokens)
            sequence.num_computed_tokens += num_tokens
            self.kv.commit(sequence, start)
            self.kv.evict_window(sequence)
            if sequence.num_computed_tokens == sequence.num_tokens:
                sequence.token_ids.append(sequence.num_tokens % 3)
        self.plan.clear()
        self.has_copies = False

    def truth(self, sequence: Sequence, position: int) -> int:
        return hash(tuple(sequence.token_ids[: position + 1]))

    def check_reads(self, sequence: Sequence, start: int, end: int) -> None:
        first = 0 if self.window is None else max(start - self.window + 1, 0)
        for position in {*range(first, end), *range(min(self.sinks, end))}:
            block = sequence.blocks[position // self.size]
            assert block != EVICTED_BLOCK
            assert self.contents[block][position % self.size] == self.truth(sequence, position)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "kv"):
            self.kv.check_invariants(self.sequences)
            stats = self.kv.stats()
            assert stats.num_live + stats.num_cached + stats.num_free == stats.num_total

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.take_copies()
        for sequence in self.sequences:
            self.kv.free(sequence)
        self.kv.check_invariants([])
        assert self.kv.stats().num_live == 0 and len(self.kv._chains) == 0


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)


def compute(kv: KvCacheManager, sequence: Sequence) -> None:
    """Computes all of a sequence's tokens, alone."""
    kv.attach(sequence, kv.match_prefix(sequence))
    start = sequence.num_computed_tokens
    assert kv.allocate(sequence, sequence.num_tokens)
    kv.take_copies()
    sequence.num_computed_tokens = sequence.num_tokens
    kv.commit(sequence, start)


def test_the_last_token_is_always_computed() -> None:
    for size in (1, 2, 4):
        kv = KvCacheManager(16, size)
        first = make_sequence(list(range(8)))
        compute(kv, first)
        match = kv.match_prefix(make_sequence(list(range(8))))
        assert match.num_tokens == 7
        whole = KvCacheManager(16, size, enable_partial_reuse=False)
        compute(whole, make_sequence(list(range(8))))
        assert whole.match_prefix(make_sequence(list(range(8)))).num_tokens == 7 // size * size


def test_freed_prefixes_outlive_their_tails() -> None:
    kv = KvCacheManager(4, 2)
    first = make_sequence([1, 2, 3, 4, 5, 6, 7, 8])
    compute(kv, first)
    kv.free(first)
    assert (kv.stats().num_cached, kv.stats().num_live) == (4, 0)
    other = make_sequence([9, 9, 9])
    assert kv.allocate(other, 3)
    assert kv.match_prefix(make_sequence([1, 2, 3, 4, 5, 6, 7, 8])).num_tokens == 4


def test_only_computed_tokens_are_found() -> None:
    kv = KvCacheManager(8, 2)
    first = make_sequence([1, 2, 3, 4, 5, 6])
    assert kv.allocate(first, 6)
    first.num_computed_tokens = 3
    kv.commit(first)
    assert kv.match_prefix(make_sequence([1, 2, 3, 4, 5, 6])).num_tokens == 2
    kv.free(first)
    assert kv.match_prefix(make_sequence([1, 2, 3, 4, 5, 6])).num_tokens == 2


def test_an_untrusted_sequence_leaves_nothing_to_find() -> None:
    kv = KvCacheManager(8, 2)
    good, bad = make_sequence([1, 2, 3, 4, 5]), make_sequence([1, 2, 3, 4, 9, 9, 9])
    compute(kv, good)
    compute(kv, bad)
    kv.free(bad, cache=False)
    assert kv.match_prefix(make_sequence([1, 2, 3, 4, 9, 9, 9])).num_tokens == 0
    kv.check_invariants([good])
    kv.free(good)
    assert kv.stats().num_free == 8


def test_a_findable_block_is_copied_before_it_is_written() -> None:
    kv = KvCacheManager(8, 4)
    source = make_sequence([1, 2, 3, 4, 5])
    compute(kv, source)
    sequence = make_sequence([1, 2, 7, 8, 9])
    assert kv.share_prefix(source, sequence, 2)
    kv.free(source)
    (cached,) = sequence.blocks
    assert kv.allocate(sequence, 5)
    assert kv.take_copies() == [(cached, sequence.blocks[0])] and sequence.blocks[0] != cached
    assert kv.match_prefix(make_sequence([1, 2, 3, 4, 5])).blocks == (cached,)


def test_a_copy_given_back_in_its_own_step_is_not_made() -> None:
    kv = KvCacheManager(3, 4)
    compute(kv, first := make_sequence([1, 2, 3, 4]))
    kv.free(first)
    sequence = make_sequence([1, 2, 3, 9])
    kv.attach(sequence, kv.match_prefix(sequence))
    assert sequence.num_computed_tokens == 3
    kv.free(sequence)
    assert kv.take_copies() == []
    assert (kv.stats().num_live, kv.stats().num_cached) == (0, 1)


def test_siblings_copy_all_but_once() -> None:
    kv = KvCacheManager(8, 4)
    compute(kv, parent := make_sequence([1, 2, 3, 4, 5]))
    children = [parent.fork(i) for i in (1, 2)]
    for child in children:
        kv.fork(parent, child)
    for sequence in (parent, *children):
        sequence.token_ids.append(6 + sequence.index)
        assert kv.allocate(sequence, 6)
    copies = kv.take_copies()
    assert len(copies) == 2 and len({s.blocks[1] for s in (parent, *children)}) == 3
    assert len({s.blocks[0] for s in (parent, *children)}) == 1
    assert kv.stats().num_live == 4


def test_what_a_copy_has_yet_to_fill_is_copied_from_its_origin() -> None:
    kv = KvCacheManager(8, 4)
    compute(kv, first := make_sequence([1, 2, 3, 4]))
    (origin,) = first.blocks
    parent = make_sequence([1, 2, 3, 9, 9])
    kv.attach(parent, kv.match_prefix(parent))
    children = [parent.fork(i) for i in (1, 2)]
    for child in children:
        kv.fork(parent, child)
    branches = (*children, parent)
    assert all(kv.allocate(sequence, 5) for sequence in branches)
    kv.check_invariants([first, *branches])
    assert len({sequence.blocks[0] for sequence in branches}) == 3
    kv.free(parent)
    assert set(kv.take_copies()) == {(origin, child.blocks[0]) for child in children}
    kv.check_invariants([first, *children])


def test_a_full_cache_of_idle_prefixes_still_serves() -> None:
    kv = KvCacheManager(6, 2)
    for family in range(3):
        compute(kv, sequence := make_sequence([family, 1, 2, 3]))
        kv.free(sequence)
    assert kv.stats().num_free == 0 and kv.num_available == 6
    sequence = make_sequence([2, 1, 2, 9, 9, 9, 9, 9, 9, 9, 9, 9])
    kv.attach(sequence, kv.match_prefix(sequence))
    assert kv.allocate(sequence, 12), "a partial match must not cost the block that the sequence needs itself"


@pytest.mark.parametrize("sinks", [0, 1, 4, 5])
def test_the_window_gives_blocks_back(sinks: int) -> None:
    kv = KvCacheManager(32, 4, window=8, num_sinks=sinks)
    sequence = make_sequence(list(range(40)))
    peak = 0
    for position in range(40):
        assert kv.allocate(sequence, position + 1)
        peak = max(peak, kv.num_held(sequence))
        sequence.num_computed_tokens = position + 1
        kv.commit(sequence, position)
        kv.evict_window(sequence)
    num_sink_blocks = -(-sinks // 4)
    assert peak <= num_sink_blocks + 3
    assert all(b != EVICTED_BLOCK for b in sequence.blocks[:num_sink_blocks])
    assert sequence.blocks[num_sink_blocks:8].count(EVICTED_BLOCK) == 8 - num_sink_blocks
    kv.free(sequence)
    assert kv.stats().num_live == 0


def test_the_next_token_goes_to_a_block_of_its_own() -> None:
    kv = KvCacheManager(8, 4)
    compute(kv, source := make_sequence([1, 2, 3, 4, 5]))
    sequence = make_sequence([1, 2, 3, 9])
    assert kv.share_prefix(source, sequence, 3)
    kv.free(source)
    (cached,) = sequence.blocks  # held by this sequence alone, but still findable
    assert kv.allocate_next(sequence)
    assert kv.take_copies() == [(cached, sequence.blocks[0])]
    sequence.num_computed_tokens = 4
    sequence.token_ids.append(8)
    assert kv.allocate_next(sequence) and len(sequence.blocks) == 2
    held = list(sequence.blocks)
    sequence.num_computed_tokens = 5
    assert kv.allocate_next(sequence) and sequence.blocks == held and kv.take_copies() == []


def test_only_the_given_tokens_are_committed() -> None:
    kv = KvCacheManager(8, 2)
    sequence = make_sequence([1, 2, 3, 4, 5, -1])  # the last one is not known yet
    assert kv.allocate(sequence, 6)
    sequence.num_computed_tokens = 6
    kv.commit(sequence, 0, 5)
    assert kv.match_prefix(make_sequence([1, 2, 3, 4, 5, 6, 7])).num_tokens == 4
    sequence.token_ids[5] = 6
    kv.commit(sequence, 5, 6)
    assert kv.match_prefix(make_sequence([1, 2, 3, 4, 5, 6, 7])).num_tokens == 6
