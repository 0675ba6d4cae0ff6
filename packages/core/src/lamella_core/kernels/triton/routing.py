"""Choosing experts: softmax over their scores and the largest of it, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl

EXPERTS_PER_WARP = 128


@triton.jit
def _top_k_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,  # [T, EXPERTS], rows row_stride apart
    experts_ptr,  # [T, TOP_K] int64
    weights_ptr,  # [T, TOP_K] float32
    row_stride,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,  # least power of two that holds EXPERTS
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,  # least power of two that holds TOP_K
    RENORMALIZE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One token; of equal scores the expert with the lowest number comes first."""
    token = tl.program_id(0).to(tl.int64)
    expert, choice = tl.arange(0, PADDED), tl.arange(0, CHOICES)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    scores = tl.load(scores_ptr + token * row_stride + expert, mask=expert < EXPERTS, other=float("-inf"))
    mass = tl.exp(scores.to(tl.float32) - tl.max(scores.to(tl.float32), axis=0))
    total = tl.sum(mass, axis=0)
    left = tl.where(expert < EXPERTS, mass / total, -1.0)
    experts = tl.zeros([CHOICES], tl.int32)
    weights = tl.zeros([CHOICES], tl.float32)
    for i in tl.static_range(TOP_K):
        weight = tl.max(left, axis=0)
        best = tl.minimum(tl.argmax(left, axis=0), EXPERTS - 1)  # not beyond, whatever NaN compares to
        experts = tl.where(choice == i, best, experts)
        weights = tl.where(choice == i, weight, weights)
        left = tl.where(expert == best, -1.0, left)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=0)
    weights = tl.where(total == total, weights, float("nan"))
    at = token * TOP_K + choice
    tl.store(experts_ptr + at, experts.to(tl.int64), mask=choice < TOP_K)
    tl.store(weights_ptr + at, weights, mask=choice < TOP_K)


def top_k_softmax(scores: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Returns the ``top_k`` largest of the softmax of each row, largest first.

    Args:
        scores: [T, experts] float32, bfloat16 or float16; computed with in float32.
        top_k: at most the number of experts.
        renormalize: rescale those of a row to sum to one.

    Returns:
        Experts [T, top_k] int64 and weights [T, top_k] float32.
    """
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    tokens, experts = scores.shape
    chosen = torch.empty((tokens, top_k), dtype=torch.int64, device=scores.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=scores.device)
    if tokens:
        padded = next_power_of_2(experts)
        _top_k_kernel[(tokens,)](
            scores, chosen, weights, scores.stride(0),
            EXPERTS=experts, PADDED=padded, TOP_K=top_k, CHOICES=next_power_of_2(top_k), RENORMALIZE=renormalize,
            USE_PDL=use_pdl(), num_warps=min(8, max(1, padded // EXPERTS_PER_WARP)), **launch_options(),
        )  # fmt: skip
    return chosen, weights
