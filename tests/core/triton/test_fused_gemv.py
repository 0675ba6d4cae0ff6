"""The gate in the kernel of the product, against the separate kernels, which round at the same places."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lamella_core.kernels.fused import SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv
from lamella_core.kernels.triton.activation import silu_and_mul

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def scale(value: float, device: str) -> torch.Tensor:
    return torch.tensor(value, device=device)


def product_scales(weight: torch.dtype, dtype: torch.dtype, device: str) -> Scales | None:
    return Scales(scale(0.02, device), scale(0.25, device), dtype) if weight == FP8 else None


@pytest.mark.parametrize("tile", [gemv.VectorTile(2, 1), gemv.VectorTile(8, 2, ahead=512)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP8])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_gate_has_the_bits_of_the_separate_kernels(
    m: int, dtype: torch.dtype, tile: gemv.VectorTile, device: str
) -> None:
    inner, k = 7, 528  # fill neither the outputs of a program nor one turn over K
    wide = BF16 if dtype == FP8 else dtype
    x, w = numbers(m, k, dtype=dtype, device=device), numbers(2 * inner, k, dtype=dtype, device=device, seed=1)
    bias = numbers(2 * inner, dtype=wide, device=device, seed=2)
    scales = product_scales(dtype, wide, device)
    for out_scale in (None, scale(0.5, device)):
        out = gemv.few_rows_matmul(x, w, bias, scales, tile=tile, after=SiluGateAfter(out_scale))
        expected = silu_and_mul(gemv.few_rows_matmul(x, w, bias, scales, tile=tile), out_scale)
        assert out.dtype == expected.dtype and torch.equal(out.float(), expected.float())


def test_gate_takes_scales_of_rows_and_outputs(device: str) -> None:
    x, w = numbers(3, 64, dtype=FP8, device=device), numbers(20, 64, dtype=FP8, device=device, seed=1)
    generator = torch.Generator().manual_seed(3)
    rows, outputs = (torch.rand(shape, generator=generator).to(device) + 0.5 for shape in ((3, 1), (20,)))
    scales, tile = Scales(rows, outputs, BF16), gemv.VectorTile(4, 1)
    out = gemv.few_rows_matmul(x, w, None, scales, tile=tile, after=SiluGateAfter(None))
    assert torch.equal(out, silu_and_mul(gemv.few_rows_matmul(x, w, None, scales, tile=tile)))


def test_a_gate_needs_pairs_of_outputs_and_vectors(device: str) -> None:
    x, gate = torch.ones(1, 32, dtype=BF16, device=device), SiluGateAfter(None)
    for n, tile in ((7, gemv.VectorTile(2, 1)), (8, gemv.VectorTile(1, 1)), (8, gemv.MatrixTile(16, 32, 2, 2))):
        with pytest.raises(ValueError, match="a gate needs"):
            gemv.few_rows_matmul(x, torch.ones(n, 32, dtype=BF16, device=device), after=gate, tile=tile)


def test_no_rows(device: str) -> None:
    empty, w = torch.empty(0, 64, dtype=BF16, device=device), torch.ones(8, 64, dtype=BF16, device=device)
    assert gemv.few_rows_matmul(empty, w, after=SiluGateAfter(None)).shape == (0, 4)
