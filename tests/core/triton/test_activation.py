"""The gated activation's kernel against the reference, with and without float8 output."""

import pytest
import torch

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.triton import activation


def make(rows, width, dtype, device):
    return (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(1)) * 4).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 14336), (3, 1024), (17, 24), (2, 1500)])
def test_equals_reference(device, dtype, rows, width):
    gate_up = make(rows, width, dtype, device)
    ours, expected = activation.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)
    assert ours.dtype == dtype
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(ours.float(), expected.float(), rtol=bound, atol=1e-6)
    if dtype is not torch.float32:
        assert (ours == expected).float().mean() > 0.995


def test_extreme_gates(device):
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], dtype=torch.bfloat16, device=device)
    gate_up = torch.cat([gate, torch.full_like(gate, 2.0)])[None]
    assert torch.equal(activation.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float8_output(device, dtype):
    gate_up = make(5, 1500, dtype, device)
    scale = torch.tensor(0.011, device=device)
    ours = activation.silu_and_mul(gate_up, scale)
    wide = reference.silu_and_mul(gate_up).float() / scale
    expected = wide.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert ours.dtype == torch.float8_e4m3fn and wide.abs().max() > 448
    assert (ours.float() == expected.float()).float().mean() > 0.995
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2**-3, atol=2**-8)


def test_other_layouts(device):
    gate_up = make(4, 64, torch.bfloat16, device)
    expected = reference.silu_and_mul(gate_up)
    wider = torch.cat([gate_up, gate_up], dim=1)[:, :128]
    assert torch.equal(activation.silu_and_mul(wider), activation.silu_and_mul(gate_up))
    across = torch.stack([gate_up, gate_up], dim=-1)[..., 0]
    assert torch.equal(activation.silu_and_mul(across), activation.silu_and_mul(gate_up))
    assert activation.silu_and_mul(gate_up[:0]).shape == (0, expected.shape[1])
