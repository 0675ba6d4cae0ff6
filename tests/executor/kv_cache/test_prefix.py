"""PrefixIndex: names of blocks and the search for the best head."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from lamella_executor.kv_cache import PrefixIndex
from lamella_executor.kv_cache.prefix import pack

BLOCK = 4
blocks = st.lists(st.integers(0, 300), min_size=BLOCK, max_size=BLOCK)


def test_look_alikes_have_different_names() -> None:
    index = PrefixIndex()
    salts = [b"", b"a", b"b", b"ab", b"root", b"\x00", b"block"]
    names = [index.root(salt) for salt in salts]
    tokens = [pack(t) for t in ([], [0], [1], [0, 1], [1, 0], [256], [0, 0], [2**40])]
    names += [index.extend(parent, t) for parent in names[:3] for t in tokens]
    names += [index.extend(index.extend(names[0], tokens[1]), tokens[2])]
    assert all(a != b for a, b in combinations(names, 2))


def test_names_differ_between_caches() -> None:
    a, b = PrefixIndex(), PrefixIndex()
    assert a.root() != b.root()
    assert a.extend(b"parent", pack([1, 2])) != b.extend(b"parent", pack([1, 2]))


def test_equal_contents_are_registered_once() -> None:
    index = PrefixIndex()
    root = index.root()
    digest = index.extend(root, pack([1, 2]))
    assert index.add(7, digest, root, pack([1, 2]))
    assert not index.add(8, digest, root, pack([1, 2]))
    assert not index.add(7, index.extend(root, pack([1, 3])), root, pack([1, 3]))
    assert index.lookup(digest) == 7 and 8 not in index and len(index) == 1
    index.remove(8)
    index.remove(7)
    assert index.lookup(digest) is None and len(index) == 0 and index.best_head(root, pack([1])) == (-1, 0)


@settings(max_examples=200, deadline=None)
@given(
    known=st.lists(blocks, unique_by=tuple, max_size=12),
    removed=st.sets(st.integers(0, 11)),
    query=st.lists(st.integers(0, 300), max_size=BLOCK),
    near=st.integers(0, 11),
    keep=st.integers(0, BLOCK),
)
def test_best_head_is_the_longest(
    known: list[list[int]], removed: set[int], query: list[int], near: int, keep: int
) -> None:
    index = PrefixIndex()
    root = index.root()
    for block, tokens in enumerate(known):
        index.add(block, index.extend(root, pack(tokens)), root, pack(tokens))
    for block in removed & set(range(len(known))):
        index.remove(block)
    if near < len(known):
        query = (known[near][:keep] + query)[:BLOCK]

    def common(tokens: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(tokens, query)) if a != b), min(len(tokens), len(query)))

    best = max((common(tokens) for block, tokens in enumerate(known) if block not in removed), default=0)
    block, num_common = index.best_head(root, pack(query))
    assert num_common == best
    assert best == 0 or (common(known[block]) == best and block not in removed)
