"""Operations that layers are made of, each on the device that its tensors are on.

CPU tensors go to `lamella_core.kernels.cpu`, CUDA tensors to `lamella_core.kernels.triton`; without triton, CUDA
tensors go through PyTorch (`lamella_core.kernels.cpu.reference`, which says what each operation means). Signatures
and errors are those of `lamella_core.kernels.cpu.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_core.context import RecurrentStep
from lamella_core.kernels import triton as triton_kernels
from lamella_core.kernels.cpu import delta_rule as cpu_delta_rule
from lamella_core.kernels.cpu import ops as cpu_ops
from lamella_core.kernels.cpu import reference
from lamella_core.kernels.cpu import state_space as cpu_state_space
from lamella_core.kernels.cpu.delta_rule import DecayParameters
from lamella_core.kernels.cpu.state_space import ScanParameters


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of x [T, H] (plus residual); with ``out_scale`` [] float32 the result may be float8."""
    if x.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.norm import rms_norm as rms_norm_kernel

        return rms_norm_kernel(x, weight, eps, residual, out_scale, unit_offset)
    return cpu_ops.rms_norm(x, weight, eps, residual, unit_offset)


def head_rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm of each head of x [T, heads, D] by itself, weight [D] for all heads; new memory."""
    if x.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.norm import head_rms_norm as head_rms_norm_kernel

        return head_rms_norm_kernel(x, weight, eps, unit_offset)
    return cpu_ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, None, unit_offset)[0].view(x.shape)


def silu_and_mul(gate_up: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """silu(gate) * up of rows [gate, up]: [T, 2I] -> [T, I]; with ``out_scale`` [] float32 the result may be float8."""
    if gate_up.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.activation import silu_and_mul as silu_and_mul_kernel

        return silu_and_mul_kernel(gate_up, out_scale)
    return cpu_ops.silu_and_mul(gate_up)


def top_k_softmax(scores: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest of softmax(scores [T, N]): places [T, top_k] int64 and values float32, perhaps rescaled."""
    if scores.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.routing import top_k_softmax as top_k_softmax_kernel

        return top_k_softmax_kernel(scores, top_k, renormalize)
    values, places = torch.softmax(scores.float(), dim=-1).topk(top_k, dim=-1)
    return places, values / values.sum(-1, keepdim=True) if renormalize else values


def rope_inplace(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False) -> None:
    """Rotates the first ``rotary_dim`` values of every head of q [T, Hq, D] and k [T, Hkv, D] in place."""
    rope = reference.rope_inplace if q.is_cuda else cpu_ops.rope_inplace
    rope(q, k, cos, sin, rotary_dim, interleaved)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Returns the rows [R] int64 of x [T, N]: [R, N]; also of float8, which `torch.index_select` does not take."""
    if x.element_size() == 1:
        return x.view(torch.uint8).index_select(0, rows).view(x.dtype)
    return x.index_select(0, rows)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, step: RecurrentStep) -> Tensor:
    """Causal convolution of each channel of x [T, C] with weight [C, W], then SiLU; brings ``windows`` up to date."""
    if x.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.state_space import causal_conv1d as causal_conv1d_kernel

        return causal_conv1d_kernel(x, weight, bias, windows, step)
    return cpu_state_space.causal_conv1d(x, weight, bias, windows, step)


def selective_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, params: ScanParameters, states: Tensor, step: RecurrentStep
) -> Tensor:
    """Selective scan of x [T, H, P] with dt [T, H], b and c [T, G, N]; brings ``states`` up to date."""
    if x.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.state_space import selective_scan as selective_scan_kernel

        return selective_scan_kernel(x, dt, b, c, params, states, step)
    return cpu_state_space.selective_scan(x, dt, b, c, params, states, step)


def gated_delta_rule(
    qkv: Tensor, a: Tensor, b: Tensor, params: DecayParameters, states: Tensor, step: RecurrentStep
) -> Tensor:
    """Gated delta rule of qkv [T, 2 K D + H V] with a and b [T, H]: [T, H, V]; brings ``states`` up to date."""
    if qkv.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.delta_rule import gated_delta_rule as gated_delta_rule_kernel

        return gated_delta_rule_kernel(qkv, a, b, params, states, step)
    return cpu_delta_rule.gated_delta_rule(qkv, a, b, params, states, step)
