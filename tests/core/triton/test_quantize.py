"""Float8 conversion bit by bit, and the two quantizers, against PyTorch's."""

import pytest
import torch
import triton
import triton.language as tl

from lamella_core.kernels.triton.quantize import from_float8, quantize_fp8, quantize_fp8_per_token, to_float8


@triton.jit
def _round_trip(x_ptr, code_ptr, back_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = to_float8(tl.load(x_ptr + at, at < n, other=0.0), False)
    tl.store(code_ptr + at, code, at < n)
    tl.store(back_ptr + at, from_float8(code, False), at < n)


def round_trip(x):
    code = torch.empty_like(x, dtype=torch.uint8)
    back = torch.empty_like(x)
    _round_trip[(-(-len(x) // 1024),)](x, code, back, len(x), 1024)
    return code.view(torch.float8_e4m3fn), back


def test_conversion_without_float8_instructions(device):
    """All finite codes, midpoints between them (half to even), their neighbours, both signs, beyond the range."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([torch.nextafter(middle, codes[1:]), torch.nextafter(middle, codes[:-1])])
    x = torch.cat([codes, middle, near, torch.tensor([449.0, 470.0, 1e9, float("inf"), 1e-30])])
    x = torch.cat([x, -x, torch.randn(500) * 3]).to(device)
    code, back = round_trip(x)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(code.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(back, expected.float())


def test_nan_stays(device):
    code, _ = round_trip(torch.tensor([float("nan"), 1.0], device=device))
    assert code.float().isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (4, 2560), (11, 48)])
def test_static(device, dtype, rows, width):
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(2)) * 20).to(dtype).to(device)
    scale = torch.tensor(0.09, device=device)
    expected = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantize_fp8(x, scale).view(torch.uint8), expected.view(torch.uint8))
    across = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(quantize_fp8(across, scale).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scale", [0.09, 1 / 3, 1.0, 448.0, 1e-5, 1e4, 1e-30])
def test_every_number_has_the_float8_of_its_exact_quotient(device, scale):
    """Zeros of both signs, subnormal numbers, midpoints, infinities; NaN stays."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).view(16, -1).to(device)
    scale = torch.tensor(scale, device=device)
    ours, expected = quantize_fp8(x, scale), (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    there = ~x.isnan()
    assert torch.equal(ours.view(torch.uint8)[there], expected.view(torch.uint8)[there])
    assert ours.float()[~there].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 14336), (3, 2560), (9, 40)])
def test_per_token(device, dtype, rows, width):
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * 20).to(dtype).to(device)
    x[-1] = 0.0
    ours, scales = quantize_fp8_per_token(x)
    expected_scales = x.float().abs().amax(1, keepdim=True).clamp_min(1e-10) / 448.0
    assert scales.shape == (rows, 1)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-7, atol=0)
    expected = (x.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


def test_no_rows(device):
    x = torch.empty(0, 64, device=device)
    assert quantize_fp8(x, torch.ones((), device=device)).shape == (0, 64)
    assert [part.shape for part in quantize_fp8_per_token(x)] == [(0, 64), (0, 1)]
