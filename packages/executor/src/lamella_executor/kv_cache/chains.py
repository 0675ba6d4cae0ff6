"""BlockChains: the digests of each sequence's whole blocks, hashed once, and what the prefix index knows of them."""

from __future__ import annotations

from lamella_executor.kv_cache.prefix import PrefixIndex, pack
from lamella_executor.sequence import Sequence


class BlockChains:
    """Sequence-wise view of a `PrefixIndex`. Token ids of a known sequence must only ever be appended to.

    Args:
        index: where blocks are registered and found.
        tokens_per_block: tokens a block holds.
        min_head_tokens: shorter matching heads of a block are not worth a copy.
    """

    def __init__(self, index: PrefixIndex, tokens_per_block: int, min_head_tokens: int) -> None:
        self._index = index
        self._size = tokens_per_block
        self._min_head_tokens = min_head_tokens
        self._root = index.root()
        self._digests: dict[Sequence, list[bytes]] = {}  # leading blocks, as far as anyone has asked

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, sequence: Sequence, limit: int) -> tuple[list[int], int, int]:
        """Looks up the first ``limit`` tokens.

        Returns:
            The blocks that hold their whole blocks, then the block whose head holds the next tokens and how many
            (-1 and 0 if none does).
        """
        blocks: list[int] = []
        while (len(blocks) + 1) * self._size <= limit:
            block = self._index.lookup(self._digest(sequence, len(blocks)))
            if block is None:
                break
            blocks.append(block)
        head = self._tokens(sequence, len(blocks), limit)
        if len(head) >= self._min_head_tokens:
            source, num_tokens = self._index.best_head(self._parent(sequence, len(blocks)), pack(head))
            if num_tokens >= self._min_head_tokens:
                return blocks, source, num_tokens
        return blocks, -1, 0

    def add(self, sequence: Sequence, i: int) -> bool:
        """Registers a sequence's whole block ``i``; False if equal contents are registered already."""
        tokens = pack(self._tokens(sequence, i, (i + 1) * self._size))
        return self._index.add(sequence.blocks[i], self._digest(sequence, i), self._parent(sequence, i), tokens)

    def inherit(self, parent: Sequence, child: Sequence) -> None:
        """A fork begins with its parent's tokens."""
        if parent in self._digests:
            self._digests[child] = list(self._digests[parent])

    def forget(self, sequence: Sequence) -> None:
        self._digests.pop(sequence, None)

    def _tokens(self, sequence: Sequence, i: int, limit: int) -> list[int]:
        return sequence.token_ids[i * self._size : min((i + 1) * self._size, limit)]

    def _parent(self, sequence: Sequence, i: int) -> bytes:
        return self._digest(sequence, i - 1) if i else self._root

    def _digest(self, sequence: Sequence, i: int) -> bytes:
        digests = self._digests.setdefault(sequence, [])
        while len(digests) <= i:
            parent = digests[-1] if digests else self._root
            tokens = self._tokens(sequence, len(digests), sequence.num_tokens)
            digests.append(self._index.extend(parent, pack(tokens)))
        return digests[i]
