"""Norm and gate in the kernel of the product, against the separate kernels, which round at the same places."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lamella_core.kernels.fused import RmsNormBefore, SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv, normed_gemv
from lamella_core.kernels.triton.activation import silu_and_mul
from lamella_core.kernels.triton.launch import is_interpreted
from lamella_core.kernels.triton.norm import rms_norm

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
EPS = 1e-5
TILES = [normed_gemv.NormedTile(2, 1, 1), normed_gemv.NormedTile(8, 2, 64), normed_gemv.NormedTile(4, 1, 3, False)]
# Of the largest value: sums in another order move a number across the middle of two now and then.
BOUNDS = {BF16: 2**-7, FP16: 2**-9, FP8: 2**-3}


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def scale(value: float, device: str) -> torch.Tensor:
    return torch.tensor(value, device=device)


def product_scales(weight: torch.dtype, dtype: torch.dtype, device: str) -> Scales | None:
    return Scales(scale(0.02, device), scale(0.25, device), dtype) if weight == FP8 else None


def check_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape and torch.isfinite(out.float()).all()
    error = (out.double() - expected.double()).abs()
    assert error.max() <= BOUNDS[out.dtype] * expected.double().abs().max()
    assert (error != 0).double().mean() < 0.05  # nearly all are equal


@pytest.mark.parametrize("tile", [gemv.VectorTile(2, 1), gemv.VectorTile(8, 2, ahead=512)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP8])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_gate_has_the_bits_of_the_separate_kernels(
    m: int, dtype: torch.dtype, tile: gemv.VectorTile, device: str
) -> None:
    inner, k = 19, 528  # fill neither the outputs of a program nor one turn over K
    wide = BF16 if dtype == FP8 else dtype
    x, w = numbers(m, k, dtype=dtype, device=device), numbers(2 * inner, k, dtype=dtype, device=device, seed=1)
    bias = numbers(2 * inner, dtype=wide, device=device, seed=2)
    scales = product_scales(dtype, wide, device)
    for out_scale in (None, scale(0.5, device)):
        out = gemv.few_rows_matmul(x, w, bias, scales, tile=tile, gate=SiluGateAfter(out_scale))
        expected = silu_and_mul(gemv.few_rows_matmul(x, w, bias, scales, tile=tile), out_scale)
        assert out.dtype == expected.dtype and torch.equal(out.float(), expected.float())


def test_gate_takes_scales_of_rows_and_outputs(device: str) -> None:
    x, w = numbers(3, 64, dtype=FP8, device=device), numbers(20, 64, dtype=FP8, device=device, seed=1)
    generator = torch.Generator().manual_seed(3)
    rows, outputs = (torch.rand(shape, generator=generator).to(device) + 0.5 for shape in ((3, 1), (20,)))
    scales, tile = Scales(rows, outputs, BF16), gemv.VectorTile(4, 1)
    out = gemv.few_rows_matmul(x, w, None, scales, tile=tile, gate=SiluGateAfter(None))
    assert torch.equal(out, silu_and_mul(gemv.few_rows_matmul(x, w, None, scales, tile=tile)))


def test_a_gate_needs_pairs_of_outputs_and_vectors(device: str) -> None:
    x, gate = torch.ones(1, 32, dtype=BF16, device=device), SiluGateAfter(None)
    for n, tile in ((7, gemv.VectorTile(2, 1)), (8, gemv.VectorTile(1, 1)), (8, gemv.MatrixTile(16, 32, 2, 2))):
        with pytest.raises(ValueError, match="a gate needs"):
            gemv.few_rows_matmul(x, torch.ones(n, 32, dtype=BF16, device=device), gate=gate, tile=tile)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("weight", [BF16, FP16, FP8])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_norm_agrees_with_the_separate_kernel(
    m: int, weight: torch.dtype, tile: normed_gemv.NormedTile, device: str
) -> None:
    n, k = 38, 336
    dtype = BF16 if weight == FP8 else weight
    x, residual = (numbers(m, k, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    gain, bias = numbers(k, dtype=dtype, device=device), numbers(n, dtype=dtype, device=device, seed=2)
    w = numbers(n, k, dtype=weight, device=device, seed=3)
    scales = product_scales(weight, dtype, device)
    normed, total = rms_norm(x, gain, EPS, residual, None if scales is None else scales.x)
    plain = gemv.few_rows_matmul(normed, w, bias, scales, tile=gemv.VectorTile(4, 1))
    before = RmsNormBefore(gain, EPS, residual)
    for out_scale in (None, scale(0.5, device)):
        gated, summed = normed_gemv.normed_matmul(x, w, before, bias, scales, gate=SiluGateAfter(out_scale), tile=tile)
        check_near(gated, silu_and_mul(plain, out_scale))
        assert torch.equal(summed, total)
    out, summed = normed_gemv.normed_matmul(x, w, before, bias, scales, tile=tile)
    check_near(out, plain)
    assert torch.equal(summed, total)


def test_first_norm_has_no_residual(device: str) -> None:
    wide = numbers(2, 96, dtype=BF16, device=device)
    x, gain = wide[:, 16:80], numbers(64, dtype=BF16, device=device, seed=1)
    w = numbers(10, 64, dtype=BF16, device=device, seed=2)
    out, total = normed_gemv.normed_matmul(x, w, RmsNormBefore(gain, EPS, None))
    check_near(out, gemv.few_rows_matmul(rms_norm(x, gain, EPS)[0], w))
    assert total is x


def test_norm_by_one_and_the_weight(device: str) -> None:
    x, gain = numbers(2, 64, dtype=BF16, device=device), numbers(64, dtype=BF16, device=device, seed=1)
    w = numbers(10, 64, dtype=BF16, device=device, seed=2)
    out, _ = normed_gemv.normed_matmul(x, w, RmsNormBefore(gain, EPS, None, unit_offset=True))
    check_near(out, gemv.few_rows_matmul(rms_norm(x, gain, EPS, unit_offset=True)[0], w))


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("k", [64, 4096, 5120])
def test_default_tiles(m: int, k: int, device: str) -> None:
    x, gain = numbers(m, k, dtype=BF16, device=device), numbers(k, dtype=BF16, device=device, seed=1)
    w = numbers(6, k, dtype=BF16, device=device, seed=2)
    out, total = normed_gemv.normed_matmul(x, w, RmsNormBefore(gain, EPS, x))
    normed, expected = rms_norm(x, gain, EPS, x)
    assert torch.equal(total, expected)
    bound = BOUNDS[BF16] * w.abs().max() * k**0.5
    assert (out - gemv.few_rows_matmul(normed, w)).abs().max() <= bound


def test_no_rows_and_too_many(device: str) -> None:
    gain, w = torch.ones(64, dtype=BF16, device=device), torch.ones(8, 64, dtype=BF16, device=device)
    empty = torch.empty(0, 64, dtype=BF16, device=device)
    out, total = normed_gemv.normed_matmul(empty, w, RmsNormBefore(gain, EPS, empty), gate=SiluGateAfter(None))
    assert out.shape == (0, 4) and total.shape == (0, 64)
    with pytest.raises(ValueError, match=r"x \[5, 64\]"):
        normed_gemv.normed_matmul(torch.ones(5, 64, dtype=BF16, device=device), w, RmsNormBefore(gain, EPS, None))
    assert not normed_gemv.serves(1, 65536) and normed_gemv.serves(4, 8192)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter has no more programs than it is told")
@pytest.mark.parametrize("weight", [BF16, FP8])
def test_whole_layers_of_a_real_size(weight: torch.dtype, device: str) -> None:
    x, gain = numbers(1, 4096, dtype=BF16, device=device), torch.ones(4096, dtype=BF16, device=device)
    w = (numbers(28672, 4096, dtype=BF16, device=device, seed=2) * 0.05).to(weight)
    scales = product_scales(weight, BF16, device)
    normed, total = rms_norm(x, gain, EPS, x, None if scales is None else scales.x)
    expected = silu_and_mul(gemv.few_rows_matmul(normed, w, None, scales))
    for _ in range(20):
        out, summed = normed_gemv.normed_matmul(
            x, w, RmsNormBefore(gain, EPS, x), None, scales, gate=SiluGateAfter(None)
        )
        assert torch.equal(summed, total)
        assert (out - expected).abs().max() <= BOUNDS[BF16] * expected.abs().max()
