"""The kernel of the gated delta rule against the CPU's in float32."""

import pytest
import torch
from tests.core.triton.test_state_space import BOUNDS, SLOTS, close, make_step, on_cpu, randn

from lamella_core.kernels.cpu import delta_rule as reference
from lamella_core.kernels.cpu.delta_rule import DecayParameters
from lamella_core.kernels.triton import delta_rule

SIZES = [(2, 4, 16, 16), (1, 3, 5, 19), (1, 1, 128, 40)]
CASES = [(torch.float32, *sizes) for sizes in SIZES] + [(dtype, *SIZES[1]) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("dtype", "key_heads", "heads", "key_dim", "value_dim"), CASES, ids=str)
@pytest.mark.parametrize(
    ("num_decode", "lengths"), [(3, ()), (0, (5, 1, 30)), (2, (13,))], ids=["decode", "prompts", "mixed"]
)
def test_gated_delta_rule(device, dtype, key_heads, heads, key_dim, value_dim, num_decode, lengths):
    step, tokens = make_step(num_decode, lengths, device), num_decode + sum(lengths)
    width = 2 * key_heads * key_dim + heads * value_dim
    qkv, ba = randn(tokens, width + 3).to(dtype), randn(tokens, 2 * heads, seed=1).to(dtype)
    weights = [0.5 * randn(heads, seed=2) - 1.0, randn(heads, seed=3)]
    states = randn(SLOTS + 1, heads, key_dim, value_dim, seed=4)
    kept = states.clone()

    def arguments(where):
        b, a = ba.to(where).split(heads, dim=1)
        return qkv.to(where)[:, :width], a, b, DecayParameters(*(weight.to(where) for weight in weights))

    expected = reference.gated_delta_rule(*arguments("cpu"), kept, on_cpu(step))
    moved = states.to(device, copy=True)
    ours = delta_rule.gated_delta_rule(*arguments(device), moved, step)
    assert ours.dtype == dtype and ours.shape == (tokens, heads, value_dim)
    close(ours, expected, BOUNDS[dtype])
    used = step.slots.long().cpu()
    close(moved[used.to(device)], kept[used], BOUNDS[torch.float32])
    others = [slot for slot in range(SLOTS + 1) if slot not in used.tolist()]
    assert torch.equal(moved.cpu()[others], states[others])
