"""The CPU's gated delta rule against a plain loop in float64; native and PyTorch; however tokens are divided."""

from __future__ import annotations

import pytest
import torch

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu import delta_rule
from lamella_core.kernels.cpu.delta_rule import DecayParameters, gated_delta_rule

SLOTS = 5
SHAPES = [(2, 4, 8, 16), (1, 3, 5, 19), (2, 2, 128, 128), (1, 2, 32, 80)]  # key heads, value heads, sizes of both
KINDS = pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])


def step_of(lengths, num_decode=0, is_first=None):
    ends = torch.tensor([0, *lengths[num_decode:]]).cumsum(0).int()
    count = len(lengths)
    first = torch.zeros(count, dtype=torch.bool) if is_first is None else torch.tensor(is_first)
    return RecurrentStep((), torch.tensor([4, 1, 3][:count], dtype=torch.int32), first, ends, num_decode, max(lengths))


def inputs(tokens, key_heads, heads, key_dim, value_dim):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    width = 2 * key_heads * key_dim + heads * value_dim
    params = DecayParameters(0.5 * randn(heads), randn(heads))
    return randn(tokens, width + 3)[:, :width], randn(tokens, heads), randn(tokens, heads), params


def by_hand(qkv, a, b, params, h, key_heads):
    """One sequence in float64: the state [D, V] of a head decays, and is corrected where the key points."""
    heads, key_dim, value_dim = h.shape
    size = key_heads * key_dim
    out = torch.zeros(qkv.shape[0], heads, value_dim, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    for t, row in enumerate(qkv.double()):
        for head in range(heads):
            group = head // (heads // key_heads)
            q = unit(row[:size].view(key_heads, key_dim)[group], dim=0) / key_dim**0.5
            k = unit(row[size : 2 * size].view(key_heads, key_dim)[group], dim=0)
            v = row[2 * size :].view(heads, value_dim)[head]
            length = torch.nn.functional.softplus((a[t, head] + params.dt_bias[head]).double())
            kept = h[head] * torch.exp(-params.a_log[head].double().exp() * length)
            beta = torch.sigmoid(b[t, head].double())
            h[head] = (torch.eye(key_dim) - beta * torch.outer(k, k)) @ kept + beta * torch.outer(k, v)
            out[t, head] = q @ h[head]
    return out


@KINDS
@pytest.mark.parametrize(("key_heads", "heads", "key_dim", "value_dim"), SHAPES)
def test_it_is_the_recurrence(monkeypatch, is_native, key_heads, heads, key_dim, value_dim):
    if not is_native:
        monkeypatch.setattr(delta_rule, "kernels", lambda: None)
    lengths, is_first = [1, 6, 3], [False, True, False]
    qkv, a, b, params = inputs(10, key_heads, heads, key_dim, value_dim)
    states = torch.randn(SLOTS + 1, heads, key_dim, value_dim, generator=torch.Generator().manual_seed(9))
    before = states.clone()
    out = gated_delta_rule(qkv, a, b, params, states, step_of(lengths, 1, is_first))
    start = 0
    for slot, length, fresh in zip((4, 1, 3), lengths, is_first):
        h = before[slot].double() * (not fresh)
        part = slice(start, start + length)
        expected = by_hand(qkv[part], a[part], b[part], params, h, key_heads)
        torch.testing.assert_close(out[part].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[slot].double(), h, rtol=1e-5, atol=1e-5)
        start += length
    assert torch.equal(states[[0, 2, 5]], before[[0, 2, 5]])


@KINDS
@pytest.mark.parametrize(("key_heads", "heads", "key_dim", "value_dim"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_divided_sequences_have_the_same_bits(monkeypatch, is_native, key_heads, heads, key_dim, value_dim, threads):
    if not is_native:
        monkeypatch.setattr(delta_rule, "kernels", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    qkv, a, b, params = inputs(30, key_heads, heads, key_dim, value_dim)
    whole = torch.zeros(SLOTS + 1, heads, key_dim, value_dim)
    expected = gated_delta_rule(qkv, a, b, params, whole, step_of([30], is_first=[True]))
    parts, states = [], torch.full_like(whole, 3.0)
    for first, last in ((0, 1), (1, 12), (12, 13), (13, 30)):
        cut = slice(first, last)
        step = step_of([last - first], is_first=[first == 0])
        parts.append(gated_delta_rule(qkv[cut], a[cut], b[cut], params, states, step))
    torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), expected) and torch.equal(states[4], whole[4])


def test_slots_that_are_not_there():
    qkv, a, b, params = inputs(2, 1, 2, 8, 8)
    step = step_of([2])
    step.slots[0] = SLOTS + 1
    with pytest.raises(ValueError, match="slot is out of range"):
        gated_delta_rule(qkv, a, b, params, torch.zeros(SLOTS + 1, 2, 8, 8), step)
