"""One call of each matmul kernel in each of its variants, for `tests.support.triton_compiler`."""

from __future__ import annotations

import torch

from lamella_core.context import KvPlace
from lamella_core.kernels.fused import RopeCacheAfter, SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv
from lamella_core.kernels.triton.launch import has_float8
from lamella_core.layers.rotary import Rotation

BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
N, K = 28672, 4096  # of the gate and up projections of Llama-3.1-8B


def calls() -> None:
    for dtype in (BF16, FLOAT8) if has_float8() else (BF16,):
        w, one = torch.empty(N, K, dtype=dtype), torch.ones(())
        scales = Scales(one, one, BF16) if dtype == FLOAT8 else None
        for m in (1, 2, 4, 16):
            gemv.few_rows_matmul(torch.empty(m, K, dtype=dtype), w, None, scales)
        gate, tile = SiluGateAfter(None if scales is None else one), gemv.VectorTile(4, 4, ahead=2048)
        for m in (1, 2, 4):
            gemv.few_rows_matmul(torch.empty(m, K, dtype=dtype), w, None, scales, tile=tile, after=gate)
        for m in (1, 4, 16):
            w_heads = torch.empty(12 * 128, K, dtype=dtype)
            gemv.few_rows_matmul(torch.empty(m, K, dtype=dtype), w_heads, None, scales, after=heads_after(m, dtype))


def heads_after(rows: int, cache_dtype: torch.dtype) -> RopeCacheAfter:
    """Rotates eight heads of queries beside two of keys and values."""
    caches = [torch.empty(3, 2, 64, 128, dtype=cache_dtype) for _ in "kv"]
    place = KvPlace(*caches, torch.zeros(rows, dtype=torch.int64), torch.ones(2), attend=None)  # type: ignore[arg-type]
    table = torch.zeros(rows, 64)
    return RopeCacheAfter(8, place, Rotation(table, table, 128, interleaved=False))
