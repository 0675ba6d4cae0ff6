"""One call of each kernel of mixtures of experts in each of its variants, for `tests.support.triton_compiler`."""

from __future__ import annotations

import torch

from lamella_core.kernels import ops
from lamella_core.kernels.experts import ExpertProjection, ExpertStack, Swiglu
from lamella_core.kernels.triton import moe, routing
from lamella_core.kernels.triton.launch import has_float8, has_wgmma

FLOAT8 = torch.float8_e4m3fn
HELD, TOP_K, H, INNER = 16, 4, 2048, 768
CLAMPED = Swiglu(alpha=1.702, offset=1.0, limit=7.0)


def projection(n: int, k: int, dtype: torch.dtype, *, scaling: str, bias: bool) -> ExpertProjection:
    return ExpertProjection(
        torch.empty(HELD, n, k, dtype=dtype),
        torch.empty(HELD, n, dtype=torch.bfloat16) if bias else None,
        None if dtype != FLOAT8 else torch.ones(HELD, n) if scaling == "dynamic" else torch.ones(HELD),
        torch.ones(HELD) if dtype == FLOAT8 and scaling == "static" else None,
    )


def stack(dtype: torch.dtype, *, scaling: str = "", bias: bool = False, gate: Swiglu | None = None) -> ExpertStack:
    return ExpertStack(
        num_experts=2 * HELD,
        first=HELD,
        gate_up=projection(2 * INNER, H, dtype, scaling=scaling, bias=bias),
        down=projection(H, INNER, dtype, scaling=scaling, bias=bias),
        activation=ops.silu_and_mul,
        gate=gate or Swiglu(),
    )


def call(
    tokens: int,
    experts: ExpertStack,
    dtype: torch.dtype = torch.bfloat16,
    tile: moe.SortedTile | None = None,
) -> None:
    chosen = torch.zeros(tokens, TOP_K, dtype=torch.int64)
    moe.gated_experts(torch.empty(tokens, H, dtype=dtype), chosen, torch.ones(tokens, TOP_K), experts, tile)


def calls() -> None:
    routing.top_k_softmax(torch.empty(4, 128, dtype=torch.bfloat16), 8, True)
    for tokens in (1, 80, 4096):
        call(tokens, stack(torch.bfloat16))
    call(8, stack(torch.float32), torch.float32)
    call(8, stack(torch.bfloat16, bias=True, gate=CLAMPED))
    call(8, stack(FLOAT8, scaling="static"))
    for tokens in (1, 4096) if has_float8() else (1,):
        call(tokens, stack(FLOAT8, scaling="dynamic"))
    if has_wgmma():
        call(4096, stack(torch.bfloat16, bias=True, gate=CLAMPED), tile=moe.SORTED_TILE)
        for scaling in ("static", "dynamic"):
            call(4096, stack(FLOAT8, scaling=scaling), tile=moe.SORTED_TILE)
