"""The kernels of state-space layers against the CPU's, which go token by token in float32."""

import pytest
import torch

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu import state_space as reference
from lamella_core.kernels.cpu.state_space import ScanParameters
from lamella_core.kernels.triton import state_space

BOUNDS = {torch.float32: 3e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
SLOTS = 9


def make_step(num_decode, lengths, device):
    """Sequences at scattered slots, every second one fresh."""
    count = num_decode + len(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(3))[:count].int()
    is_first = torch.arange(count) % 2 == 1
    return RecurrentStep((), slots.to(device), is_first.to(device), ends.to(device), num_decode, max([1, *lengths]))


def on_cpu(step):
    return RecurrentStep(
        (), step.slots.cpu(), step.is_first.cpu(), step.query_start.cpu(), step.num_decode, step.max_query_len
    )


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours, expected, bound):
    difference = (ours.cpu().float() - expected.float()).abs().max()
    assert difference <= bound * max(1.0, expected.float().abs().max()), difference


STEPS = pytest.mark.parametrize(
    ("num_decode", "lengths"), [(3, ()), (0, (5, 1, 70)), (2, (33,))], ids=["decode", "prompts", "mixed"]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "width", "has_bias"), [(150, 4, True), (24, 2, False)])
@STEPS
def test_convolution(device, dtype, channels, width, has_bias, num_decode, lengths):
    step, tokens = make_step(num_decode, lengths, device), num_decode + sum(lengths)
    wide = randn(tokens, 2 * channels).to(dtype)
    weight, bias = randn(channels, width, seed=1).to(dtype), randn(channels, seed=2).to(dtype) if has_bias else None
    windows = randn(SLOTS + 1, channels, width - 1, seed=3).to(dtype)
    kept = windows.clone()
    expected = reference.causal_conv1d(wide[:, :channels], weight, bias, kept, on_cpu(step))
    moved, bias = windows.to(device, copy=True), None if bias is None else bias.to(device)
    ours = state_space.causal_conv1d(wide.to(device)[:, :channels], weight.to(device), bias, moved, step)
    assert torch.equal(moved.cpu(), kept) and not torch.equal(kept, windows)
    close(ours, expected, {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype])


SIZES = [(70, 1, 1, 16), (10, 1, 1, 5), (4, 16, 2, 16), (3, 24, 1, 19), (4, 80, 4, 32), (2, 8, 1, 16)]
CASES = [(torch.float32, *sizes) for sizes in SIZES] + [(torch.bfloat16, *sizes) for sizes in SIZES[1:3]]


@pytest.mark.parametrize(("dtype", "heads", "head_dim", "groups", "size"), CASES, ids=str)
@STEPS
def test_scan(device, dtype, heads, head_dim, groups, size, num_decode, lengths):
    step, tokens = make_step(num_decode, lengths, device), num_decode + sum(lengths)
    x = randn(tokens, heads * head_dim + 3).to(dtype)
    dt, bc = randn(tokens, heads, seed=1).to(dtype), randn(tokens, 2 * groups * size, seed=2).to(dtype)
    a_log = 0.3 * randn(*((heads, size) if head_dim == 1 else (heads,)), seed=3) - 1.0
    bounds = (0.1, 1.5) if groups == 2 else (0.0, None)
    weights = [a_log, randn(heads, seed=4), randn(heads, seed=5)]
    states = randn(SLOTS + 1, heads, head_dim, size, seed=6)
    kept = states.clone()

    def arguments(where):
        inputs = (x.to(where)[:, : heads * head_dim].unflatten(1, (heads, head_dim)), dt.to(where))
        b, c = bc.to(where).split(groups * size, dim=1)
        params = ScanParameters(*(weight.to(where) for weight in weights), *bounds)
        return *inputs, b.unflatten(1, (groups, size)), c.unflatten(1, (groups, size)), params

    expected = reference.selective_scan(*arguments("cpu"), kept, on_cpu(step))
    moved = states.to(device, copy=True)
    ours = state_space.selective_scan(*arguments(device), moved, step)
    close(ours, expected, BOUNDS[dtype])
    used = step.slots.long().cpu()
    close(moved[used.to(device)], kept[used], BOUNDS[dtype])
    others = [slot for slot in range(SLOTS + 1) if slot not in used.tolist()]
    assert torch.equal(moved.cpu()[others], states[others])


def test_long_steps_and_short_ones(device):
    """Step lengths of e^-20 and of 40 neither vanish nor overflow."""
    step = make_step(0, (40,), device)
    x, bc = randn(40, 2, 16).to(device), randn(40, 1, 16, seed=1).to(device)
    dt = torch.linspace(-20.0, 40.0, 40)[:, None].expand(40, 2).contiguous()
    zeros = torch.zeros(2)
    states = torch.zeros(SLOTS + 1, 2, 16, 16)
    params = ScanParameters(zeros, zeros, zeros)
    expected = reference.selective_scan(x.cpu(), dt, bc.cpu(), bc.cpu(), params, states.clone(), on_cpu(step))
    params = ScanParameters(*(zeros.to(device),) * 3)
    ours = state_space.selective_scan(x, dt.to(device), bc, bc, params, states.to(device), step).cpu()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (ours[:4].abs() > 0).all()
