"""The norm kernel against the reference: rounding order, residual, float8 output, odd widths."""

import pytest
import torch

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.triton import norm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# A last place of the statistics may move a value that lies between two of its dtype.
BOUND = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}
EPS = 1e-5


def make(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*s, generator=generator) * 2).to(dtype).to(device) for s in shape]


def assert_same(ours, expected, dtype):
    ours, expected = ours.float(), expected.float()
    torch.testing.assert_close(ours, expected, rtol=BOUND[dtype], atol=1e-6)
    if dtype is not torch.float32:
        assert (ours == expected).float().mean() > 0.995


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (5, 2560), (3, 16384), (19, 128), (7, 80), (2, 12)])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
def test_equals_reference(device, dtype, rows, width, with_residual):
    x, residual, weight = make([(rows, width), (rows, width), (width,)], dtype, device)
    before = x.clone()
    ours, total = norm.rms_norm(x, weight, EPS, residual if with_residual else None)
    expected, expected_total = reference.rms_norm(x, weight, EPS, residual if with_residual else None)
    assert ours.dtype == dtype
    assert_same(ours, expected, dtype)
    assert torch.equal(total, expected_total)
    assert torch.equal(x, before)


def test_rounds_before_the_weight(device):
    """bfloat16(x / rms) * weight, not bfloat16(x / rms * weight): they differ on many values."""
    x, weight = make([(4, 1024), (1024,)], torch.bfloat16, device)
    ours, _ = norm.rms_norm(x, weight, EPS)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    late = (wide * weight.float()).to(torch.bfloat16)
    assert (late == reference.rms_norm(x, weight, EPS)[0]).float().mean() < 0.9
    assert (ours == reference.rms_norm(x, weight, EPS)[0]).float().mean() > 0.995


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_offset_multiplies_before_rounding(device, dtype):
    x, residual, weight = make([(5, 640), (5, 640), (640,)], dtype, device)
    ours, total = norm.rms_norm(x, weight, EPS, residual, unit_offset=True)
    expected, expected_total = reference.rms_norm(x, weight, EPS, residual, unit_offset=True)
    assert_same(ours, expected, dtype)
    assert torch.equal(total, expected_total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 4, 128), (9, 3, 80), (0, 2, 16)])
def test_heads_of_a_fused_projection(device, dtype, unit_offset, tokens, heads, width):
    fused, weight = make([(tokens, 7, width), (width,)], dtype, device)
    for x in (fused[:, 2 : 2 + heads], fused.transpose(0, 1)[:, :tokens]):
        ours = norm.head_rms_norm(x, weight, EPS, unit_offset)
        assert ours.is_contiguous() and ours.dtype == dtype and ours.shape == x.shape
        if tokens:
            assert_same(ours, reference.rms_norm(x, weight, EPS, None, unit_offset)[0], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (6, 1536), (9, 64)])
def test_float8_output(device, dtype, rows, width):
    x, residual, weight = make([(rows, width), (rows, width), (width,)], dtype, device)
    weight[0] = 3000.0  # saturates
    scale = torch.tensor(0.037, device=device)
    ours, total = norm.rms_norm(x, weight, EPS, residual, scale)
    normed, expected_total = reference.rms_norm(x, weight, EPS, residual)
    expected = (normed.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert ours.dtype == torch.float8_e4m3fn
    assert torch.equal(total, expected_total)
    assert (ours.float() == expected.float()).float().mean() > 0.995
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2**-3, atol=2**-8)


def test_rows_of_a_wider_tensor(device):
    wide, weight = make([(6, 300), (128,)], torch.bfloat16, device)
    x = wide[:, 40:168]
    ours, _ = norm.rms_norm(x, weight, EPS)
    assert_same(ours, reference.rms_norm(x, weight, EPS)[0], torch.bfloat16)


def test_what_the_kernel_does_not_take(device):
    x, weight = make([(3, 64), (64,)], torch.bfloat16, device)
    ours, _ = norm.rms_norm(x, weight.float(), EPS)
    assert torch.equal(ours, reference.rms_norm(x, weight.float(), EPS)[0])
    across = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(norm.rms_norm(across, weight, EPS)[0], reference.rms_norm(x, weight, EPS)[0])
    empty, total = norm.rms_norm(x[:0], weight, EPS, x[:0])
    assert empty.shape == total.shape == (0, 64)
