"""Paged attention against a float64 oracle that knows nothing of blocks, and its bitwise independence of batching."""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from lamella_core.kernels.cpu import ops, reference
from lamella_core.kernels.sparsity import BlockSparsity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    q_heads: int = 8
    kv_heads: int = 2
    block_size: int = 16
    query_lens: tuple = (5, 1, 70)
    context_lens: tuple = (50, 133, 70)
    window: int = 0
    chunked: bool = False
    sinks: int = 0
    softcap: float = 0.0
    alibi: bool = False
    rounds_alibi: bool = False
    sink_logits: bool = False
    value_dim: int = 0  # of a latent cache: values are the last so many numbers of keys
    prefixes: tuple | None = None  # tokens of each sequence that see each other
    sparsity: BlockSparsity | None = None


class Batch:
    """Random queries and per-sequence keys and values, laid out in shuffled blocks; window-evicted blocks are -1."""

    def __init__(self, case, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.case = case
        self.q = [torch.randn(n, case.q_heads, case.head_dim, generator=g).to(case.dtype) for n in case.query_lens]
        shape = (case.kv_heads, case.head_dim)
        self.k, self.v = (
            [torch.randn(n, *shape, generator=g).to(case.dtype) for n in case.context_lens] for _ in range(2)
        )
        if case.value_dim:
            self.v = [k[..., -case.value_dim :] for k in self.k]
        self.options = {
            "scale": 1 / math.sqrt(case.head_dim),
            "sliding_window": case.window,
            "is_chunked": case.chunked,
            "num_sinks": case.sinks,
            "softcap": case.softcap,
            "alibi_slopes": torch.rand(case.q_heads, generator=g).bfloat16().float() if case.alibi else None,
            "rounds_alibi": case.rounds_alibi,
            "sink_logits": torch.randn(case.q_heads, generator=g) if case.sink_logits else None,
            "sparsity": case.sparsity,
        }

    def run(self, parts, function=ops.paged_attention, shuffle=3):
        """Attention of ``parts`` = [(sequence, first query, end query)] in one call; one output per part."""
        case, size = self.case, self.case.block_size
        contexts = [self.case.context_lens[s] - len(self.q[s]) + end for s, _, end in parts]
        width = max(-(-n // size) for n in contexts) + 1
        count = sum(-(-n // size) for n in contexts) + 2
        ids = iter(torch.randperm(count, generator=torch.Generator().manual_seed(shuffle)).tolist())
        tables = torch.full((len(parts), width), -1, dtype=torch.int32)
        caches = [torch.full((count, case.kv_heads, size, case.head_dim), float("nan"), dtype=case.dtype) for _ in "kv"]
        if case.value_dim:
            caches[1] = caches[0][..., -case.value_dim :]
        for row, ((s, first, end), context) in enumerate(zip(parts, contexts)):
            begin = context - (end - first)  # position of the first query
            oldest = begin - case.window + 1 if case.window else 0
            if case.chunked:
                oldest = begin // case.window * case.window
            for block in range(-(-context // size)):
                if block * size >= case.sinks and (block + 1) * size <= oldest:
                    continue  # evicted
                tables[row, block] = next(ids)
                keys = slice(block * size, min((block + 1) * size, context))
                for cache, source in zip(caches, (self.k[s], self.v[s])):
                    cache[tables[row, block], :, : keys.stop - keys.start] = source[keys].transpose(0, 1)
        lengths = [end - first for _, first, end in parts]
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        q = torch.cat([self.q[s][first:end] for s, first, end in parts])
        wide = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)[
            :, : case.q_heads
        ]  # strided like a fused projection
        prefixes = None if case.prefixes is None else torch.tensor([case.prefixes[s] for s, _, _ in parts]).int()
        lens = torch.tensor(contexts, dtype=torch.int32)
        out = function(wide, *caches, tables, starts, lens, prefix_lens=prefixes, **self.options)
        return out.split(lengths)

    def whole(self, **kwargs):
        return self.run([(s, 0, len(q)) for s, q in enumerate(self.q)], **kwargs)

    def oracle(self, s):
        case, o = self.case, self.options
        group = case.q_heads // case.kv_heads
        k, v = (x[s].double().repeat_interleave(group, dim=1) for x in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", self.q[s].double(), k) * o["scale"]
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        positions = torch.arange(len(self.q[s])) + len(k) - len(self.q[s])
        distance = positions[:, None] - torch.arange(len(k))[None]
        if case.rounds_alibi:
            keys = _to_8_bits(torch.arange(len(k)).double())
            scores = scores + o["scale"] * _to_8_bits(o["alibi_slopes"].double()[:, None, None] * keys)
        elif case.alibi:
            scores = scores - o["alibi_slopes"].double()[:, None, None] * distance
        seen = distance >= 0
        if case.window:
            oldest = positions // case.window * case.window if case.chunked else positions - case.window + 1
            keys = torch.arange(len(k))[None]
            seen &= (keys >= oldest[:, None]) | (keys < case.sinks)
        if case.prefixes is not None:
            seen[positions < case.prefixes[s], : case.prefixes[s]] = True
        if case.sparsity is not None:
            seen = seen & torch.tensor(
                [[[_is_in_pattern(case.sparsity, h, p, key) for key in range(len(k))] for p in positions.tolist()]
                 for h in range(case.q_heads)]
            )  # fmt: skip
        scores = scores.masked_fill(~seen, float("-inf"))
        if case.sink_logits:
            scores = torch.cat([scores, o["sink_logits"].double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
        return torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1)[..., : len(k)], v)


def _to_8_bits(x):
    """Nearest numbers of 8 significant bits, ties to even: those of bfloat16."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp((fraction * 256).round(), exponent - 8)


def _is_in_pattern(sparsity, head, position, key):
    block, own = key // sparsity.block_size, position // sparsity.block_size
    column = (block + sparsity.head_step * (head + sparsity.first_head) + 1) % sparsity.vert_stride == 0
    return own - block < sparsity.num_local_blocks or column


CASES = {
    "gqa": Case(),
    "mha": Case(q_heads=4, kv_heads=4),
    "mqa": Case(q_heads=6, kv_heads=1),
    "wide_group": Case(q_heads=71, kv_heads=1, query_lens=(2,), context_lens=(40,)),
    "head_128": Case(head_dim=128),
    "head_256": Case(head_dim=256),
    "head_80": Case(head_dim=80),
    "head_8": Case(head_dim=8),
    "head_12": Case(head_dim=12),
    "odd_blocks": Case(block_size=7),
    "big_blocks": Case(block_size=64),
    "window": Case(window=33),
    "window_1": Case(window=1),
    "sinks": Case(window=20, sinks=4, block_size=4, query_lens=(5, 1, 70), context_lens=(50, 333, 170)),
    "chunks": Case(window=24, chunked=True),
    "small_chunks": Case(window=5, chunked=True, block_size=4, query_lens=(5, 1, 70), context_lens=(50, 333, 170)),
    "softcap": Case(softcap=3.0),
    "alibi": Case(alibi=True),
    "rounded_alibi": Case(alibi=True, rounds_alibi=True, query_lens=(5, 1, 70), context_lens=(50, 533, 300)),
    "rounded_alibi_window": Case(alibi=True, rounds_alibi=True, window=33, head_dim=80, context_lens=(50, 533, 300)),
    "sink_logits": Case(sink_logits=True),
    "latent": Case(head_dim=52, value_dim=37, q_heads=20, kv_heads=1, block_size=8),
    "latent_grouped": Case(head_dim=96, value_dim=64, q_heads=40, kv_heads=2, window=33),
    "latent_large": Case(head_dim=576, value_dim=512, kv_heads=1, query_lens=(3, 1), context_lens=(40, 70)),
    "prefixes": Case(prefixes=(20, 0, 45)),
    "whole_prefixes": Case(prefixes=(48, 133, 70), kv_heads=8, softcap=3.0),
    "sparse": Case(sparsity=BlockSparsity(8, 2, 3, 1)),
    "sparse_second_half": Case(sparsity=BlockSparsity(32, 1, 2, 3, first_head=5), block_size=4),
    "sparse_alike": Case(sparsity=BlockSparsity(5, 3, 4, 0), kv_heads=1),
    "empty_query": Case(query_lens=(0, 3), context_lens=(10, 3)),
}


@pytest.mark.parametrize("function", [ops.paged_attention, reference.paged_attention], ids=["ops", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64_attention(case, dtype, function):
    batch = Batch(replace(case, dtype=dtype))
    for s, out in enumerate(batch.whole(function=function)):
        assert out.dtype == dtype
        assert len(out) == 0 or (out.double() - batch.oracle(s)).abs().max() < BOUND[dtype]


@pytest.mark.parametrize(
    "name",
    [
        "gqa",
        "mha",
        "head_128",
        "head_80",
        "odd_blocks",
        "window",
        "sinks",
        "softcap",
        "alibi",
        "rounded_alibi",
        "sink_logits",
        "latent",
        "latent_grouped",
        "sparse",
    ],
)
@pytest.mark.parametrize("function", [ops.paged_attention, reference.paged_attention], ids=["ops", "reference"])
def test_float32_query_has_the_same_bits_however_it_is_computed(name, function):
    if function is reference.paged_attention and name not in ("gqa", "sinks"):
        pytest.skip("two cases suffice for the slow version")
    batch = Batch(CASES[name])
    batch.run = functools.partial(batch.run, function=function)
    whole = batch.whole()
    for s, q in enumerate(batch.q):
        alone = batch.run([(s, 0, len(q))], shuffle=5)[0]
        assert torch.equal(alone, whole[s])
        for cuts in ([1], [len(q) // 2], [3, 4, len(q) - 1]):
            edges = [0, *sorted({c for c in cuts if 0 < c < len(q)}), len(q)]
            chunks = [batch.run([(s, a, b)], shuffle=a)[0] for a, b in zip(edges, edges[1:])]
            assert torch.equal(torch.cat(chunks), whole[s])
    mixed = batch.run([(2, 60, 61), (0, 0, 5), (1, 0, 1), (2, 10, 40)])
    assert torch.equal(mixed[0], whole[2][60:61]) and torch.equal(mixed[3], whole[2][10:40])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(map(torch.equal, batch.whole(), whole))
    finally:
        torch.set_num_threads(threads)


def test_block_size_does_not_change_the_bits():
    whole = Batch(Case()).whole()
    for size in (1, 5, 32, 128):
        assert all(map(torch.equal, Batch(Case(block_size=size)).whole(), whole))


def test_nan_stays_in_its_sequence_and_behind_its_position():
    batch = Batch(Case())
    clean = batch.whole()
    batch.v[2][40:], batch.k[0][:] = float("nan"), float("nan")
    dirty = batch.whole()
    assert dirty[0].isnan().all() and torch.equal(dirty[1], clean[1])
    assert torch.equal(dirty[2][:40], clean[2][:40]) and dirty[2][40:].isnan().all()


def test_large_scores_do_not_overflow():
    batch = Batch(Case(query_lens=(3,), context_lens=(64,)))
    batch.q[0] *= 1e4
    out = batch.whole()[0]
    assert out.isfinite().all()
    assert (out.double() - batch.oracle(0)).abs().max() < 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_tables": torch.tensor([[0, 9]], dtype=torch.int32)}, "out of range"),
        ({"block_tables": torch.tensor([[0]], dtype=torch.int32)}, "out of range"),
        ({"context_lens": torch.tensor([1], dtype=torch.int32)}, "out of range"),
        ({"query_start": torch.tensor([0, 5], dtype=torch.int32)}, "out of range"),
        ({"query_start": torch.tensor([0], dtype=torch.int32)}, "query_start"),
        ({"alibi_slopes": torch.zeros(3)}, "per-head"),
        ({"q": torch.zeros(2, 3, 8)}, "does not fit"),
        ({"prefix_lens": torch.tensor([7], dtype=torch.int32)}, "out of range"),
        ({"prefix_lens": torch.tensor([1, 1], dtype=torch.int32)}, "prefix_lens"),
        ({"v_cache": torch.zeros(2, 2, 4, 9)}, "differ in shape"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(change, message):
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "k_cache": torch.zeros(2, 2, 4, 8),
        "v_cache": torch.zeros(2, 2, 4, 8),
        "block_tables": torch.tensor([[0, 1]], dtype=torch.int32),
        "query_start": torch.tensor([0, 2], dtype=torch.int32),
        "context_lens": torch.tensor([6], dtype=torch.int32),
        "scale": 1.0,
    }
    assert ops.paged_attention(**arguments).shape == (2, 4, 8)
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**(arguments | change))
