"""Products of few rows against float64: every row count, dtype, tile shape, and sizes that fill no tile."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv
from lamella_core.kernels.triton.launch import is_interpreted

FP8 = torch.float8_e4m3fn
# Of the largest result: one rounding to the output's dtype, and sums in float32.
BOUNDS = {torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-5}
TILES = [gemv.VectorTile(2, 1), gemv.VectorTile(8, 2, ahead=512), gemv.MatrixTile(16, 32, 2, 2)]


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, scales: Scales | None) -> torch.Tensor:
    out = x.double() @ w.double().t()
    if scales is not None:
        out = out * scales.x.double() * scales.w.double()
    return out if bias is None else out + bias.double()


def check(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and out.shape == expected.shape
    assert torch.isfinite(out).all()
    assert (out.double() - expected).abs().max() <= BOUNDS[dtype] * expected.abs().max()


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16])
def test_product_is_that_of_float64(m: int, dtype: torch.dtype, device: str) -> None:
    n, k = 37, 1040  # fill neither the outputs of a program nor one turn over K
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    x, w = numbers(m, k, dtype=dtype, device=device), numbers(n, k, dtype=dtype, device=device, seed=1)
    scales = None
    if dtype == FP8:
        scales = Scales(torch.tensor(0.25, device=device), torch.tensor(0.5, device=device), out_dtype)
    check(gemv.few_rows_matmul(x, w, None, scales), product(x, w, None, scales), out_dtype)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k", [64, 256, 528])
def test_every_tile_computes_the_same(k: int, tile: gemv.VectorTile | gemv.MatrixTile, device: str) -> None:
    x = numbers(4, k, dtype=torch.bfloat16, device=device)
    w = numbers(40, k, dtype=torch.bfloat16, device=device, seed=1)
    bias = numbers(40, dtype=torch.bfloat16, device=device, seed=2)
    check(gemv.few_rows_matmul(x, w, bias, tile=tile), product(x, w, bias, None), torch.bfloat16)


@pytest.mark.parametrize("m", [2, 6])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("per_output", [False, True])
def test_float8_scales_of_rows_and_outputs(m: int, per_row: bool, per_output: bool, device: str) -> None:
    x, w = numbers(m, 96, dtype=FP8, device=device), numbers(24, 96, dtype=FP8, device=device, seed=1)
    bias = numbers(24, dtype=torch.float16, device=device, seed=2)
    generator = torch.Generator().manual_seed(3)
    x_scale = torch.rand((m, 1) if per_row else (), generator=generator).to(device) + 0.5
    w_scale = torch.rand((24,) if per_output else (), generator=generator).to(device) + 0.5
    scales = Scales(x_scale, w_scale, torch.float16)
    check(gemv.few_rows_matmul(x, w, bias, scales), product(x, w, bias, scales), torch.float16)


def test_rows_of_a_wider_tensor(device: str) -> None:
    wide = numbers(3, 160, dtype=torch.bfloat16, device=device)
    x, w = wide[:, 32:96], numbers(16, 64, dtype=torch.bfloat16, device=device, seed=1)
    check(gemv.few_rows_matmul(x, w), product(x, w, None, None), torch.bfloat16)


def test_values_outside_the_weight_do_not_matter(device: str) -> None:
    """Rows and columns past the end are masked: NaN beside them must not reach the result."""
    padded = torch.full((20, 64), torch.nan, dtype=torch.bfloat16, device=device)
    padded[:17] = numbers(17, 64, dtype=torch.bfloat16, device=device)
    x = torch.full((4, 64), torch.nan, dtype=torch.bfloat16, device=device)
    x[:3] = numbers(3, 64, dtype=torch.bfloat16, device=device, seed=1)
    for tile in TILES:
        out = gemv.few_rows_matmul(x[:3], padded[:17], tile=tile)
        check(out, product(x[:3], padded[:17], None, None), torch.bfloat16)


def test_no_rows(device: str) -> None:
    x, w = (
        torch.empty(0, 32, dtype=torch.bfloat16, device=device),
        torch.ones(8, 32, dtype=torch.bfloat16, device=device),
    )
    assert gemv.few_rows_matmul(x, w).shape == (0, 8)


def test_too_many_rows_are_refused(device: str) -> None:
    w = torch.ones(8, 32, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="17 rows"):
        gemv.few_rows_matmul(torch.ones(17, 32, dtype=torch.bfloat16, device=device), w)
    with pytest.raises(ValueError, match="5 rows"):
        gemv.few_rows_matmul(torch.ones(5, 32, dtype=torch.bfloat16, device=device), w, tile=TILES[0])


@pytest.mark.parametrize("m", range(1, 17))
def test_default_tiles_serve_all_row_counts(m: int) -> None:
    for n, k, itemsize in ((4096, 4096, 2), (128256, 4096, 2), (4096, 14336, 1), (16, 16, 1)):
        tile = gemv.default_tile(m, n, k, itemsize)
        assert not isinstance(tile, gemv.VectorTile) or m <= gemv.MOST_VECTOR_ROWS
        assert isinstance(tile, gemv.VectorTile) or m > 1
        assert tile.block_n & (tile.block_n - 1) == 0 and tile.num_warps in (1, 2, 4, 8)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter computes in another order")
def test_the_same_bits_every_time(device: str) -> None:
    x = numbers(4, 4096, dtype=torch.bfloat16, device=device)
    w = numbers(4096, 4096, dtype=torch.bfloat16, device=device, seed=1)
    first = gemv.few_rows_matmul(x, w)
    assert all(torch.equal(gemv.few_rows_matmul(x, w), first) for _ in range(20))
