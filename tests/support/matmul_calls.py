"""One call of each matmul kernel in each of its variants, for `tests.support.triton_compiler`."""

from __future__ import annotations

import torch

from lamella_core.kernels.fused import RmsNormBefore, SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv, normed_gemv
from lamella_core.kernels.triton.launch import has_float8

BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
N, K = 28672, 4096  # of the gate and up projections of Llama-3.1-8B


def calls() -> None:
    normed_gemv._processors = lambda device: 132
    for dtype in (BF16, FLOAT8) if has_float8() else (BF16,):
        w, one = torch.empty(N, K, dtype=dtype), torch.ones(())
        scales = Scales(one, one, BF16) if dtype == FLOAT8 else None
        for m in (1, 2, 4, 16):
            gemv.few_rows_matmul(torch.empty(m, K, dtype=dtype), w, None, scales)
        for m in (1, 2, 4):
            around(torch.empty(m, K, dtype=BF16), w, scales)


def around(x: torch.Tensor, w: torch.Tensor, scales: Scales | None) -> None:
    gate = SiluGateAfter(None if scales is None else scales.x)
    tile = gemv.VectorTile(4, 4, ahead=2048)
    gemv.few_rows_matmul(x.to(w.dtype), w, None, scales, tile=tile, gate=gate)
    norm = RmsNormBefore(x[0], 1e-5, x)
    normed_gemv.normed_matmul(x, w, norm, None, scales)
    normed_gemv.normed_matmul(x, w, norm, x[0].repeat(N // K), scales, gate=gate)
