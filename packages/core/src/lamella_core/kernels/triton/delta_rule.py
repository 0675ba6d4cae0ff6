"""The gated delta rule on GPUs, token by token.

A program holds some columns of one head's state, which no other program reads, from a sequence's first token of the
step to its last. Nothing waits for the device, and launches of steps of single tokens depend on shapes alone, so they
can be captured. `lamella_core.kernels.cpu.delta_rule` says what the operation means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu.delta_rule import LEAST_SQUARE, DecayParameters
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl
from lamella_core.kernels.triton.state_space import softplus, token_bounds

STATE_VALUES = 2048  # of a state that one program holds: rows times columns


@triton.jit(do_not_specialize=["first"])
def _delta_rule_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, states_ptr, slots_ptr, is_first_ptr, query_start_ptr, out_ptr,
    first, qkv_stride, a_stride, b_stride, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, LEAST: tl.constexpr, IS_DECODE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_V columns of the state [D, V] of one head of a sequence per program."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence, block = tl.program_id(0), tl.program_id(1)
    begin, end = token_bounds(query_start_ptr, sequence, first, IS_DECODE)
    if not IS_DECODE:
        sequence += first
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    head = block // BLOCKS
    is_fresh = tl.load(is_first_ptr + sequence) != 0
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    row = tl.arange(0, BLOCK_D)
    column = block % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    in_key, in_value = row < D, column < V
    in_state = in_key[:, None] & in_value[None, :]
    state_at = states_ptr + (slot * H + head) * (D * V) + row[:, None] * V + column[None, :]
    state = tl.load(state_at, in_state & (is_fresh == 0), other=0.0)
    rate = -tl.exp(tl.load(a_log_ptr + head))
    dt_bias = tl.load(dt_bias_ptr + head)
    at = begin.to(tl.int64)
    q_at = qkv_ptr + at * qkv_stride + head // (H // K) * D + row
    v_at = qkv_ptr + at * qkv_stride + 2 * K * D + head * V + column
    a_at, b_at = a_ptr + at * a_stride + head, b_ptr + at * b_stride + head
    out_at = out_ptr + (at * H + head) * V + column
    for _ in range(begin, end):
        q = tl.load(q_at, in_key, other=0.0).to(tl.float32)
        k = tl.load(q_at + K * D, in_key, other=0.0).to(tl.float32)
        v = tl.load(v_at, in_value, other=0.0).to(tl.float32)
        q *= scale / tl.sqrt(tl.sum(q * q, axis=0) + LEAST)
        k *= 1.0 / tl.sqrt(tl.sum(k * k, axis=0) + LEAST)
        state *= tl.exp(rate * softplus(tl.load(a_at).to(tl.float32) + dt_bias))
        beta = 1.0 / (1.0 + tl.exp(-tl.load(b_at).to(tl.float32)))
        delta = beta * (v - tl.sum(state * k[:, None], axis=0))
        state += k[:, None] * delta[None, :]
        y = tl.sum(state * q[:, None], axis=0)
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), in_value)
        q_at, v_at, out_at = q_at + qkv_stride, v_at + qkv_stride, out_at + H * V
        a_at, b_at = a_at + a_stride, b_at + b_stride
    tl.store(state_at, state, in_state)


def gated_delta_rule(
    qkv: Tensor, a: Tensor, b: Tensor, params: DecayParameters, states: Tensor, step: RecurrentStep
) -> Tensor:
    """See `lamella_core.kernels.cpu.delta_rule.gated_delta_rule`.

    ``qkv``, ``a`` and ``b`` may be views of wider rows; a row's values adjoin.
    """
    _, heads, key_dim, value_dim = states.shape
    key_heads = (qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    out = torch.empty(qkv.shape[0], heads, value_dim, dtype=qkv.dtype, device=qkv.device)
    block_d = next_power_of_2(key_dim)
    block_v = min(next_power_of_2(value_dim), max(1, STATE_VALUES // block_d))
    num_others = step.slots.shape[0] - step.num_decode
    for is_decode, count in ((True, step.num_decode), (False, num_others)):
        if not count:
            continue
        _delta_rule_kernel[(count, heads * -(-value_dim // block_v))](
            qkv, a, b, params.a_log, params.dt_bias, states, step.slots, step.is_first.view(torch.uint8),
            step.query_start, out, step.num_decode, qkv.stride(0), a.stride(0), b.stride(0), key_dim**-0.5,
            H=heads, K=key_heads, D=key_dim, V=value_dim, LEAST=LEAST_SQUARE, IS_DECODE=is_decode, BLOCK_D=block_d,
            BLOCK_V=block_v, USE_PDL=use_pdl(), num_warps=1, **launch_options(),
        )  # fmt: skip
    return out
