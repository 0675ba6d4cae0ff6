"""ShardSpec: the ranks' pieces put together again are the full tensor."""

from __future__ import annotations

import pytest
import torch

from lamella_core.errors import ConfigError
from lamella_core.layers.sharding import (
    Section,
    ShardSpec,
    fused,
    replicated,
    split,
    split_heads,
    split_padded,
    whole,
)


def fill(spec, source, section=None, **where):
    """Returns the rank's parameter with one source copied in, NaN elsewhere."""
    out = torch.full(spec.shape, float("nan"))
    copy_into(out, spec, source, section, **where)
    return out


def copy_into(out, spec, source, section=None, **where):
    assert tuple(source.shape) == spec.source_shape(section, **where)
    for piece in spec.pieces(section, **where):
        part = source[piece.source]
        out[piece.target] = part.transpose(-1, -2) if piece.transpose else part


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def qkv(rank, tp, heads=8, kv_heads=2, head_dim=4, hidden=6):
    sections = [
        split_heads(n, head_dim, tp, rank, name=s, groups=kv_heads)
        for s, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    ]
    return ShardSpec(dims=(fused(sections), (whole(hidden),)))


@pytest.mark.parametrize("tp", [1, 2, 3, 6])
@pytest.mark.parametrize("dim", [0, 1])
def test_split_parts_make_the_whole(tp, dim):
    full = numbered(12, 12)
    parts = []
    for rank in range(tp):
        section = split(12, tp, rank, what="size")
        dims = [(whole(12),), (whole(12),)]
        dims[dim] = (section,)
        spec = ShardSpec(dims=tuple(dims))
        parts.append(fill(spec, full))
    assert torch.equal(torch.cat(parts, dim), full)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_fused_heads(tp):
    sources = {"q": numbered(32, 6), "k": numbered(8, 6) + 1000, "v": numbered(8, 6) + 2000}
    for rank in range(tp):
        spec = qkv(rank, tp)
        out = torch.full(spec.shape, float("nan"))
        for name, source in sources.items():
            copy_into(out, spec, source, name)
        kv = (
            slice(rank * 2 // tp * 4, rank * 2 // tp * 4 + 4) if tp > 2 else slice(rank * 8 // tp, (rank + 1) * 8 // tp)
        )
        expected = [sources["q"][rank * 32 // tp : (rank + 1) * 32 // tp], sources["k"][kv], sources["v"][kv]]
        assert torch.equal(out, torch.cat(expected))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("transpose", [False, True])
def test_interleaved_source_equals_separate_ones(tp, kv_heads, transpose):
    sources = {"q": numbered(32, 6), "k": numbered(4 * kv_heads, 6) + 1000, "v": numbered(4 * kv_heads, 6) + 2000}
    groups = torch.cat([source.view(kv_heads, -1, 6) for source in sources.values()], dim=1).reshape(-1, 6)
    together = groups.T.contiguous() if transpose else groups
    for rank in range(tp):
        spec = qkv(rank, tp, kv_heads=kv_heads)
        separate = torch.full(spec.shape, float("nan"))
        for name, source in sources.items():
            copy_into(separate, spec, source, name)
        out = torch.full(spec.shape, float("nan"))
        for piece in spec.pieces(transpose=transpose, interleaved=True):
            part = together[piece.source]
            out[piece.target] = part.transpose(-1, -2) if transpose else part
        assert torch.equal(out, separate)


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("transpose", [False, True])
def test_fused_source_equals_separate_ones(tp, transpose):
    sources = {"q": numbered(32, 6), "k": numbered(8, 6) + 1000, "v": numbered(8, 6) + 2000}
    together = torch.cat(list(sources.values()))
    for rank in range(tp):
        spec = qkv(rank, tp)
        separate = torch.full(spec.shape, float("nan"))
        for name, source in sources.items():
            copy_into(separate, spec, source, name)
        assert torch.equal(fill(spec, together.T if transpose else together, transpose=transpose), separate)
        named = fill(spec, together, ("q", "k", "v"))
        assert torch.equal(named, separate)


@pytest.mark.parametrize(("vocab", "tp"), [(131, 2), (5, 4), (2, 4), (8, 4)])
def test_padded_vocabulary(vocab, tp):
    full, rows = numbered(vocab, 3), []
    for rank in range(tp):
        spec = ShardSpec(dims=((split_padded(vocab, tp, rank),), (whole(3),)))
        assert spec.shape == (-(-vocab // tp), 3)
        part = fill(spec, full)
        assert int(part.isnan().any(1).sum()) == max(0, min(-(-vocab // tp), (rank + 1) * -(-vocab // tp) - vocab))
        rows.append(part)
    stacked = torch.cat(rows)
    assert torch.equal(stacked[~stacked.isnan().any(1)], full)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_stacked_experts(tp, ep):
    experts, inner, hidden = 4, 6, 3
    gate, up = numbered(experts, inner, hidden), numbered(experts, inner, hidden) + 1000
    for rank in range(tp * ep):
        ep_rank, tp_rank = rank % ep, rank // ep
        held = experts // ep
        both = fused([split(inner, tp, tp_rank, what="size", name=n) for n in ("gate", "up")])
        stack = Section(experts, ep_rank * held, held, held)
        spec = ShardSpec(dims=((stack,), both, (whole(hidden),)), stacked_experts=True)
        out = torch.full(spec.shape, float("nan"))
        for e in range(experts):
            copy_into(out, spec, gate[e], "gate", expert=e)
            copy_into(out, spec, up[e], "up", expert=e)
            assert bool(spec.pieces("gate", expert=e)) == (ep_rank * held <= e < (ep_rank + 1) * held)
        assert not out.isnan().any()
        assert torch.equal(fill(spec, torch.cat((gate, up), 1)), out)
        swapped = torch.cat((gate, up), 1).transpose(1, 2).contiguous()
        assert torch.equal(fill(spec, swapped, transpose=True), out)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="hidden 10 .* 4 ranks"):
        split(10, 4, 0, what="hidden")
    with pytest.raises(ConfigError, match="3 heads and 2 ranks"):
        split_heads(3, 8, 2, 0, name="k")
    with pytest.raises(ConfigError, match="no section 'x'"):
        qkv(0, 1).pieces("x")
    with pytest.raises(ConfigError, match="stacks no experts"):
        replicated(3).pieces(expert=1)
