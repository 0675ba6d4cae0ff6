"""KvCacheManager: gives sequences their blocks, shares equal prefixes, copies on write, evicts behind the window.

It writes `Sequence.blocks` and, when a prefix is attached, `Sequence.num_computed_tokens`; it never touches tensors.
``Sequence.token_ids`` must only ever be appended to while the sequence is known here.

A block that must be written but is shared or findable is first copied (`take_copies`).

Everything here happens when steps are planned and launched, which may be before they are computed. That is sound since
steps are computed in the order of their launches (`LaunchingRunner.launch`):

* A block given back while a step in flight still reads or writes it may be handed out at once; its next owner, a later
  step, writes it later.
* A sequence writes only blocks that are its own and not findable, so a row in flight of a request that has ended spoils
  nothing: its blocks cannot be found, shared or copied until a later owner has filled them.
* A block is made findable when a launched step has filled it and all its tokens are known; who finds it reads it in a
  later step.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamella_executor.kv_cache.block_pool import BlockPool
from lamella_executor.kv_cache.chains import BlockChains
from lamella_executor.kv_cache.copies import BlockCopies
from lamella_executor.kv_cache.prefix import PrefixIndex
from lamella_executor.kv_cache.states import StateSlots
from lamella_executor.sequence import EVICTED_BLOCK, Sequence


@dataclass(frozen=True, slots=True)
class KvCacheStats:
    """Blocks by place (live + cached + free == total), and what prefix reuse has saved so far."""

    num_live: int
    num_cached: int
    num_free: int
    num_total: int
    num_queried_tokens: int  # tokens of sequences that were started with a look-up
    num_reused_tokens: int  # of those, found in the cache


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache holds of a sequence's beginning; valid until the next change of the cache."""

    blocks: tuple[int, ...] = ()  # whole blocks; EVICTED_BLOCK where the window has passed already
    num_tokens: int = 0  # tokens that need not be computed, those of the partial head included
    num_idle: int = 0  # of the blocks, how many nobody holds (attaching makes them unavailable)
    head_source: int = EVICTED_BLOCK  # block whose head continues the prefix and would be copied

    @property
    def num_held(self) -> int:
        """Blocks the sequence will hold by attaching, without the copy of the head."""
        return len(self.blocks) - self.blocks.count(EVICTED_BLOCK)


NO_MATCH = PrefixMatch()


class KvCacheManager:
    """Block tables of all sequences of one engine. Not thread-safe: the loop's thread owns it.

    Args:
        num_blocks: blocks in total.
        tokens_per_block: tokens a block holds.
        enable_block_reuse: whole blocks are kept after use and shared with sequences that begin with the same tokens.
        enable_partial_reuse: the matching head of a block that differs later is copied instead of computed.
        window: tokens visible to a query at most, over all layers, its own included; None: some layer sees everything.
        num_sinks: first tokens that stay visible beside the window.
        num_state_slots: slots for the recurrent states of sequences, as many as may compute; 0: the model has none.
            With states nothing is reused: those at the end of a prefix are not kept.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        *,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        window: int | None = None,
        num_sinks: int = 0,
        num_state_slots: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse and not num_state_slots
        self.window = window
        self.num_sink_blocks = -(-num_sinks // tokens_per_block)
        self._states = StateSlots(num_state_slots)
        self._index = PrefixIndex()
        self._pool = BlockPool(num_blocks, on_evict=self._index.remove)
        self._copies = BlockCopies(self._pool)
        min_head_tokens = max(1, tokens_per_block // 8) if enable_partial_reuse else tokens_per_block
        self._chains = BlockChains(self._index, tokens_per_block, min_head_tokens)
        self._num_queried_tokens = 0
        self._num_reused_tokens = 0

    # sizes

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free or evictable."""
        return self._pool.num_available

    @property
    def num_state_slots(self) -> int:
        """Slots for recurrent states in total; 0: the model has none."""
        return self._states.num_slots

    @property
    def num_live(self) -> int:
        """Blocks that somebody holds."""
        return self._pool.num_live

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks hold that many tokens."""
        return -(-num_tokens // self.tokens_per_block)

    def num_held(self, sequence: Sequence) -> int:
        return len(sequence.blocks) - (sequence.blocks.count(EVICTED_BLOCK) if self.window is not None else 0)

    def stats(self) -> KvCacheStats:
        pool = self._pool
        return KvCacheStats(
            num_live=pool.num_live,
            num_cached=pool.num_cached,
            num_free=pool.num_free,
            num_total=pool.num_blocks,
            num_queried_tokens=self._num_queried_tokens,
            num_reused_tokens=self._num_reused_tokens,
        )

    def check_invariants(self, sequences: list[Sequence] | None = None) -> None:
        """Verifies the books; with all live ``sequences``, also that their tables account for every reference.

        Raises:
            RuntimeError: a block is lost, held twice, or findable without being kept.
        """
        self._pool.check_invariants()
        findable = [b for b in range(self.num_blocks) if self._pool.is_cacheable(b)]
        if len(findable) != len(self._index) or any(b not in self._index for b in findable):
            raise RuntimeError("the pool and the prefix index disagree about what is cached")
        if sequences is None:
            return
        expected = [self._copies.num_pins(b) for b in range(self.num_blocks)]
        for sequence in sequences:
            for block in sequence.blocks:
                if block != EVICTED_BLOCK:
                    expected[block] += 1
        slots = [sequence.state_slot for sequence in sequences if sequence.state_slot >= 0]
        if len(set(slots)) != len(slots) or len(slots) + self._states.num_free != self._states.num_slots:
            raise RuntimeError(f"sequences hold the slots {sorted(slots)}, {self._states.num_free} are free")
        for block, refs in enumerate(expected):
            if refs != self._pool.refs(block):
                raise RuntimeError(f"KV block {block} has {self._pool.refs(block)} references, {refs} holders")

    # the life of a sequence

    def match_prefix(self, sequence: Sequence) -> PrefixMatch:
        """Looks up how much of a sequence without blocks is cached; takes nothing.

        At most ``num_tokens - 1`` tokens match, so that the last one is always computed. The digests are kept for the
        next look-up until `free`, which is due even if the sequence never starts.
        """
        if not self.enable_block_reuse or sequence.blocks:
            return NO_MATCH
        blocks, source, num_head = self._chains.find(sequence, sequence.num_tokens - 1)
        num_tokens = len(blocks) * self.tokens_per_block
        for i in range(self.num_sink_blocks, self._first_visible_block(num_tokens + num_head)):
            if i < len(blocks):
                blocks[i] = EVICTED_BLOCK
        num_idle = sum(1 for b in blocks if b != EVICTED_BLOCK and self._pool.refs(b) == 0)
        # The source is held beside everything this sequence needs; without room for that, go without the head.
        if num_head and self._pool.num_available - num_idle <= self.blocks_for(sequence.num_tokens) - len(blocks):
            source, num_head = EVICTED_BLOCK, 0
        return PrefixMatch(tuple(blocks), num_tokens + num_head, num_idle, source)

    def attach(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Starts a sequence on what `match_prefix` found just before."""
        for block in match.blocks:
            if block != EVICTED_BLOCK:
                self._pool.share(block)
        sequence.blocks = list(match.blocks)
        if match.head_source != EVICTED_BLOCK:
            self._pool.share(match.head_source)
            sequence.blocks.append(self._copies.queue(match.head_source))
        sequence.num_computed_tokens = match.num_tokens
        self._num_queried_tokens += sequence.num_tokens
        self._num_reused_tokens += match.num_tokens

    def allocate(self, sequence: Sequence, upto_tokens: int) -> bool:
        """Makes tokens [num_computed_tokens, upto_tokens) writable: new blocks, and copies of those held by others.

        Returns:
            False, and nothing changed, if there are not enough blocks.
        """
        blocks = sequence.blocks
        num_new = -(-upto_tokens // self.tokens_per_block) - len(blocks)
        first = sequence.num_computed_tokens // self.tokens_per_block
        shared = [i for i in range(first, len(blocks)) if not self._is_writable(blocks[i])]
        if num_new <= 0 and not shared:
            return True
        if max(num_new, 0) + len(shared) > self._pool.num_available:
            return False
        if self._states.num_slots and sequence.state_slot < 0:
            sequence.state_slot = self._states.take()
        for i in shared:
            blocks[i] = self._copies.queue(blocks[i])
        for _ in range(num_new):
            blocks.append(self._pool.take())
        return True

    def allocate_next(self, sequence: Sequence) -> bool:
        """Does what `allocate` does for the next token alone, which is nothing for most tokens."""
        start, blocks = sequence.num_computed_tokens, sequence.blocks
        i = start // self.tokens_per_block
        if i < len(blocks) and self._pool.is_exclusive(blocks[i]):
            return True
        return self.allocate(sequence, start + 1)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Gives ``child``, a `Sequence.fork` of ``parent``, the same blocks; whoever writes first gets a copy.

        Recurrent states are copied, as they are when the next step begins.
        """
        if child.blocks:
            raise RuntimeError(f"sequence {child.index} already has blocks and cannot become a fork")
        for block in parent.blocks:
            if block != EVICTED_BLOCK:
                self._pool.share(block)
        child.blocks = list(parent.blocks)
        if parent.state_slot >= 0:
            child.state_slot = self._states.fork(parent.state_slot)
        self._chains.inherit(parent, child)

    def share_prefix(self, source: Sequence, sequence: Sequence, num_tokens: int) -> bool:
        """Starts a sequence without blocks on the first ``num_tokens`` of another, which has computed them.

        The caller has checked that both begin with the same ``num_tokens`` tokens.

        Returns:
            False, and nothing changed, if ``source`` has given back blocks that are still visible there, or has a
            recurrent state, which is no longer that of the prefix.
        """
        if source.state_slot >= 0:
            return False
        blocks = source.blocks[: self.blocks_for(num_tokens)]
        visible = self._first_visible_block(num_tokens)
        if any(b == EVICTED_BLOCK and (i < self.num_sink_blocks or i >= visible) for i, b in enumerate(blocks)):
            return False
        for block in blocks:
            if block != EVICTED_BLOCK:
                self._pool.share(block)
        sequence.blocks = blocks
        sequence.num_computed_tokens = num_tokens
        return True

    def commit(self, sequence: Sequence, start: int = 0, end: int | None = None) -> None:
        """Makes the blocks filled by tokens [start, end) findable.

        Args:
            sequence: its tokens before ``end`` are known, and computed by a launched step.
            start: first token computed, or first one known, since the last commit.
            end: None: num_computed_tokens.
        """
        size = self.tokens_per_block
        first, last = start // size, (sequence.num_computed_tokens if end is None else end) // size
        if first >= last or not self.enable_block_reuse:
            return
        for i in range(first, last):
            if sequence.blocks[i] != EVICTED_BLOCK and self._chains.add(sequence, i):
                self._pool.mark_cacheable(sequence.blocks[i])

    def evict_window(self, sequence: Sequence) -> None:
        """Gives back the blocks that no later token of the sequence can see; sinks stay."""
        if self.window is None:
            return
        blocks = sequence.blocks
        i = self._first_visible_block(sequence.num_computed_tokens) - 1
        while i >= self.num_sink_blocks and blocks[i] != EVICTED_BLOCK:
            self._release(blocks[i])
            blocks[i] = EVICTED_BLOCK
            i -= 1

    def free(self, sequence: Sequence, *, cache: bool = True) -> None:
        """Takes all blocks from a sequence, which then has computed nothing; harmless when repeated.

        Deeper blocks are released first and so evicted first: prefixes, which more sequences share, stay longer.

        Args:
            sequence: one that ended, was aborted or is paused.
            cache: False when its contents cannot be trusted (a failed step): nobody will find its blocks again.
        """
        for block in reversed(sequence.blocks):
            if block == EVICTED_BLOCK:
                continue
            if not cache and block in self._index:
                self._index.remove(block)
                self._pool.unmark_cacheable(block)
            self._release(block)
        if sequence.state_slot >= 0:
            self._states.release(sequence.state_slot)
            sequence.state_slot = -1
        sequence.blocks = []
        sequence.num_computed_tokens = 0
        self._chains.forget(sequence)

    def take_copies(self) -> list[tuple[int, int]]:
        """Returns the (source, destination) copies to carry out before the forward, and lets go of the sources."""
        return self._copies.take()

    def take_state_copies(self) -> list[tuple[int, int]]:
        """Returns the (source, destination) copies of recurrent states, to carry out in order before the forward."""
        return self._states.take_copies()

    # parts

    def _first_visible_block(self, num_computed_tokens: int) -> int:
        """Index of the first block, sinks aside, that the token at this position can see."""
        if self.window is None:
            return 0
        return max(num_computed_tokens - self.window + 1, 0) // self.tokens_per_block

    def _is_writable(self, block: int) -> bool:
        is_exclusive = self._pool.refs(block) - self._copies.num_pins(block) == 1
        return is_exclusive and not self._pool.is_cacheable(block)

    def _release(self, block: int) -> None:
        self._copies.drop(block)
        self._pool.release(block)
