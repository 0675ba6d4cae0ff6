"""BlockCopies: copies of blocks that the next step makes before its forward pass."""

from __future__ import annotations

from lamella_executor.kv_cache.block_pool import BlockPool


class BlockCopies:
    """Pending (source, destination) pairs.

    Each source stays held until the copies are taken, and what is to be copied from a block that a copy has yet to fill
    is copied from where that one comes from. So no source is also a destination and no destination occurs twice: the
    runner may carry them out in any order.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._sources: dict[int, int] = {}  # destination -> source
        self._pins: dict[int, int] = {}  # source -> references held for its copies

    def num_pins(self, block: int) -> int:
        """References to a block that belong to pending copies, not to a sequence."""
        return self._pins.get(block, 0)

    def queue(self, source: int) -> int:
        """Queues a copy into a new block and returns it; the caller gives up its reference to the source."""
        destination = self._pool.take()
        origin = self._sources.get(source)
        if origin is not None:
            self._pool.share(origin)
            self._pool.release(source)  # others hold it, or it would be written in place
            source = origin
        self._sources[destination] = source
        self._pins[source] = self._pins.get(source, 0) + 1
        return destination

    def drop(self, destination: int) -> None:
        """Forgets the copy into a block that is given back before it was made; no-op for any other block."""
        source = self._sources.pop(destination, None)
        if source is None:
            return
        self._pins[source] -= 1
        if not self._pins[source]:
            del self._pins[source]
        self._pool.release(source)

    def take(self) -> list[tuple[int, int]]:
        """Returns the (source, destination) pairs and lets go of the sources."""
        if not self._sources:
            return []
        copies = [(source, destination) for destination, source in self._sources.items()]
        for source, num_pins in self._pins.items():
            for _ in range(num_pins):
                self._pool.release(source)
        self._sources.clear()
        self._pins.clear()
        return copies
