"""PrefixIndex: finds blocks by the tokens they hold and all tokens before them.

A block's name is the digest of (its parent's digest, its token ids); the first block's parent is a root that carries a
salt (empty, or whatever else the keys and values depend on: an adapter, a tenant). Digests are blake2b under a key
drawn per index, over tagged and length-prefixed fields, so that no chosen prompt can collide with another's.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass

_TOKEN_BYTES = array("q").itemsize
_DIGEST_BYTES = 32
_ROOT_TAG = b"root"
_BLOCK_TAG = b"block"


def pack(token_ids: list[int]) -> bytes:
    """Returns the token ids as native int64, the form in which blocks are hashed and compared."""
    return array("q", token_ids).tobytes()


def _common_tokens(a: bytes, b: bytes) -> int:
    """Returns how many leading tokens two packed lists share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length // _TOKEN_BYTES
    first = next(i for i in range(length) if a[i] != b[i])
    return first // _TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    parent: bytes
    tokens: bytes  # packed, one whole block


class PrefixIndex:
    """Digest -> block, and for each parent its blocks in token order, to find the best matching head."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._blocks: dict[bytes, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._children: dict[bytes, list[tuple[bytes, int]]] = {}  # parent digest -> sorted (packed tokens, block)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def root(self, salt: bytes = b"") -> bytes:
        """Returns the parent digest of first blocks; sequences share blocks only under an equal salt."""
        return self._digest(_ROOT_TAG, salt)

    def extend(self, parent: bytes, tokens: bytes) -> bytes:
        """Returns the digest of the block with these packed tokens after ``parent``."""
        return self._digest(_BLOCK_TAG, parent, tokens)

    def lookup(self, digest: bytes) -> int | None:
        return self._blocks.get(digest)

    def best_head(self, parent: bytes, tokens: bytes) -> tuple[int, int]:
        """Finds the block after ``parent`` that shares the longest head with ``tokens``.

        Packed tokens are kept sorted, so the best match is one of the two neighbours of where ``tokens`` would stand.

        Returns:
            (block, number of shared tokens); the number is 0 when nothing matches.
        """
        children = self._children.get(parent)
        best = (-1, 0)
        if children:
            at = bisect_left(children, (tokens, -1))
            for packed, block in children[max(at - 1, 0) : at + 1]:
                num_common = _common_tokens(packed, tokens)
                if num_common > best[1]:
                    best = (block, num_common)
        return best

    def add(self, block: int, digest: bytes, parent: bytes, tokens: bytes) -> bool:
        """Makes a block findable; False if the block or equal contents are registered already."""
        if digest in self._blocks or block in self._entries:
            return False
        self._blocks[digest] = block
        self._entries[block] = _Entry(digest, parent, tokens)
        insort(self._children.setdefault(parent, []), (tokens, block))
        return True

    def remove(self, block: int) -> None:
        """Forgets a block; no-op for one that is not registered."""
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        del self._blocks[entry.digest]
        children = self._children[entry.parent]
        del children[bisect_left(children, (entry.tokens, block))]
        if not children:
            del self._children[entry.parent]

    def _digest(self, tag: bytes, *fields: bytes) -> bytes:
        message = b"".join(len(field).to_bytes(8, "little") + field for field in (tag, *fields))
        return hashlib.blake2b(message, key=self._key, digest_size=_DIGEST_BYTES).digest()
