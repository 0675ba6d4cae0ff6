"""BlockPool: who holds which block of the paged KV cache.

A block is in exactly one of three places: live (reference count above 0), cached (count 0, contents findable as a
prefix, evictable), or free. The pool knows block ids and counts only; what a block contains is the prefix index's
business, who holds it the manager's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class BlockPool:
    """Reference counts, the free list, and the cached blocks in eviction order.

    Args:
        num_blocks: blocks in total, ids 0 .. num_blocks - 1.
        on_evict: called with the id of a cached block just before it is handed out for other contents.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"BlockPool.num_blocks is {num_blocks}; it must be at least 1")
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._refs = [0] * num_blocks
        self._is_cacheable = bytearray(num_blocks)  # 1: contents are findable, so an unreferenced block is kept
        self._free = list(range(num_blocks - 1, -1, -1))  # stack; low ids first
        self._cached: OrderedDict[int, None] = OrderedDict()  # count 0 and cacheable; oldest first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_live(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out: free ones, then cached ones."""
        return len(self._free) + len(self._cached)

    def refs(self, block: int) -> int:
        return self._refs[block]

    def is_cacheable(self, block: int) -> bool:
        return bool(self._is_cacheable[block])

    def is_exclusive(self, block: int) -> bool:
        """Whether it has one holder and its contents are not findable."""
        return self._refs[block] == 1 and not self._is_cacheable[block]

    def take(self) -> int:
        """Hands out a block with count 1: a free one, else the cached block that was released longest ago.

        Raises:
            RuntimeError: every block is live; callers check `num_available` first.
        """
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            if self._on_evict is not None:
                self._on_evict(block)
            self._is_cacheable[block] = 0
        else:
            raise RuntimeError(f"all {self.num_blocks} KV blocks are live")
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """Adds a holder to a live or cached block."""
        if self._refs[block] == 0:
            if block not in self._cached:
                raise RuntimeError(f"KV block {block} is free and cannot be shared")
            del self._cached[block]
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """Takes one holder off; an unheld block becomes the youngest cached one if cacheable, else free."""
        if self._refs[block] == 0:
            raise RuntimeError(f"KV block {block} was released more often than held")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if self._is_cacheable[block]:
                self._cached[block] = None
            else:
                self._free.append(block)

    def mark_cacheable(self, block: int) -> None:
        """The contents of a live block can be found from now on."""
        if self._refs[block] == 0:
            raise RuntimeError(f"KV block {block} is not live; only a live block can become cacheable")
        self._is_cacheable[block] = 1

    def unmark_cacheable(self, block: int) -> None:
        """The contents can no longer be found; a cached block becomes free."""
        self._is_cacheable[block] = 0
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check_invariants(self) -> None:
        """Verifies that every block is in exactly one place; O(num_blocks), for tests and idle moments.

        Raises:
            RuntimeError: the books do not balance; the message names the first offending block.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a KV block is twice in the free list")
        num_live = 0
        for block, refs in enumerate(self._refs):
            places = (block in free) + (block in self._cached) + (refs > 0)
            if refs < 0 or places != 1:
                raise RuntimeError(
                    f"KV block {block} is in {places} places (refs {refs}, free {block in free}, "
                    f"cached {block in self._cached})"
                )
            if refs == 0 and (block in self._cached) != bool(self._is_cacheable[block]):
                raise RuntimeError(f"KV block {block} is unheld but in the wrong list for its contents")
            num_live += refs > 0
        if num_live + len(self._cached) + len(free) != self.num_blocks:
            raise RuntimeError(
                f"KV blocks leaked: {num_live} live + {len(self._cached)} cached + {len(free)} free "
                f"!= {self.num_blocks} in total"
            )
