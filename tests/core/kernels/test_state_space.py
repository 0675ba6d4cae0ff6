"""The CPU's scan and convolution against plain loops in float64; native and PyTorch; however tokens are divided."""

from __future__ import annotations

import math

import pytest
import torch

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu import state_space
from lamella_core.kernels.cpu.state_space import ScanParameters, causal_conv1d, selective_scan

SLOTS = 5
SHAPES = [(7, 1, 1, 16), (6, 1, 1, 5), (4, 12, 2, 19), (2, 8, 1, 32)]  # heads, channels of each, groups, state


def step_of(lengths, num_decode=0, is_first=None):
    ends = torch.tensor([0, *lengths[num_decode:]]).cumsum(0).int()
    count = len(lengths)
    first = torch.zeros(count, dtype=torch.bool) if is_first is None else torch.tensor(is_first)
    slots = torch.tensor([4, 1, 3][:count], dtype=torch.int32)
    return RecurrentStep((), slots, first, ends, num_decode, max(lengths))


def scan_inputs(tokens, heads, size, groups, state, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    a_log = randn(heads, state) if size == 1 else randn(heads)
    params = ScanParameters(0.5 * a_log, randn(heads), randn(heads), 0.2, 2.5)
    return (
        randn(tokens, heads, size),
        randn(tokens, heads),
        randn(tokens, groups, state),
        randn(tokens, groups, state),
        params,
    )


def by_hand(x, dt, b, c, params, h):
    """One sequence in float64, number by number."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for head in range(x.shape[1]):
            length = math.log1p(math.exp(float(dt[t, head] + params.dt_bias[head])))
            length = min(max(length, params.dt_min), params.dt_max)
            decay = torch.exp(-length * params.a_log[head].double().exp())
            group = head // (x.shape[1] // b.shape[1])
            for p in range(x.shape[2]):
                value = x[t, head, p].double()
                h[head, p] = h[head, p] * decay + length * value * b[t, group].double()
                out[t, head, p] = (h[head, p] * c[t, group].double()).sum() + params.d[head] * value
    return out


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize(("heads", "size", "groups", "state"), SHAPES)
def test_scan_is_the_recurrence(monkeypatch, is_native, heads, size, groups, state):
    if not is_native:
        monkeypatch.setattr(state_space, "kernels", lambda: None)
    lengths, is_first = [1, 6, 3], [False, True, False]
    x, dt, b, c, params = scan_inputs(10, heads, size, groups, state)
    states = torch.randn(SLOTS + 1, heads, size, state, generator=torch.Generator().manual_seed(9))
    before = states.clone()
    out = selective_scan(x, dt, b, c, params, states, step_of(lengths, 1, is_first))
    start = 0
    for slot, length, fresh in zip((4, 1, 3), lengths, is_first):
        h = before[slot].double() * (not fresh)
        part = slice(start, start + length)
        expected = by_hand(x[part], dt[part], b[part], c[part], params, h)
        torch.testing.assert_close(out[part].double(), expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(states[slot].double(), h, rtol=1e-5, atol=2e-5)
        start += length
    assert torch.equal(states[[0, 2, 5]], before[[0, 2, 5]])


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize(("heads", "size", "groups", "state"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_divided_sequences_have_the_same_bits(monkeypatch, is_native, heads, size, groups, state, threads):
    if not is_native:
        monkeypatch.setattr(state_space, "kernels", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, dt, b, c, params = scan_inputs(30, heads, size, groups, state)
    whole = torch.zeros(SLOTS + 1, heads, size, state)
    expected = selective_scan(x, dt, b, c, params, whole, step_of([30], is_first=[True]))
    parts, states = [], torch.full_like(whole, 3.0)
    for first, last in ((0, 1), (1, 12), (12, 13), (13, 30)):
        cut = slice(first, last)
        step = step_of([last - first], is_first=[first == 0])
        parts.append(selective_scan(x[cut], dt[cut], b[cut], c[cut], params, states, step))
    torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), expected) and torch.equal(states[4], whole[4])


def test_convolution_is_that_of_each_sequence():
    channels, width = 6, 4
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(channels, width, generator=generator), torch.randn(channels, generator=generator)
    windows = torch.randn(SLOTS + 1, channels, width - 1, generator=generator)
    lengths, is_first = [1, 2, 9], [False, True, False]
    x, before = torch.randn(12, channels, generator=generator), windows.clone()
    out, start = causal_conv1d(x, weight, bias, windows, step_of(lengths, 1, is_first)), 0
    for slot, length, fresh in zip((4, 1, 3), lengths, is_first):
        inputs = torch.cat((before[slot] * (not fresh), x[start : start + length].T), dim=1)
        raw = torch.nn.functional.conv1d(inputs[None], weight[:, None], bias, groups=channels)[0].T
        torch.testing.assert_close(out[start : start + length], torch.nn.functional.silu(raw), rtol=1e-5, atol=1e-5)
        assert torch.equal(windows[slot], inputs[:, -(width - 1) :])
        start += length
    assert torch.equal(windows[[0, 2, 5]], before[[0, 2, 5]])


def test_slots_that_are_not_there():
    x, dt, b, c, params = scan_inputs(2, 2, 8, 1, 8)
    step = step_of([2])
    step.slots[0] = SLOTS + 1
    with pytest.raises(ValueError, match="slot is out of range"):
        selective_scan(x, dt, b, c, params, torch.zeros(SLOTS + 1, 2, 8, 8), step)
