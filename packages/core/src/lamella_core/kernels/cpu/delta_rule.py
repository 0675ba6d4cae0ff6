"""The gated delta rule on the CPU, over packed sequences (Gated DeltaNet, Yang et al. 2024).

Legend: T tokens, S sequences; H value heads of V numbers and K key heads of D numbers, each of which serves H / K
neighbouring value heads. In float32 a sequence has the same results and states, bit by bit, however its tokens are
divided into calls, and whatever runs beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu.abi import check_status, kernels
from lamella_core.kernels.cpu.state_space import sequence_starts, softplus, tree_sum

LEAST_SQUARE = 1e-6  # added to the sum of squares of queries and keys


@dataclass(frozen=True)
class DecayParameters:
    """The weights of a gated delta rule, float32 on its device."""

    a_log: Tensor  # [H]: states decay at the rate exp(a_log)
    dt_bias: Tensor  # [H], added to a before softplus


def gated_delta_rule(
    qkv: Tensor, a: Tensor, b: Tensor, params: DecayParameters, states: Tensor, step: RecurrentStep
) -> Tensor:
    """Runs the recurrence h = g h + k^T beta (v - k g h), y = q h over each sequence.

    Here g = exp(-exp(a_log) softplus(a + dt_bias)), beta is the sigmoid of b, and k and q have the lengths 1 and
    1 / sqrt(D).

    Args:
        qkv: [T, 2 K D + H V], a token's queries, keys and values.
        a: [T, H].
        b: [T, H].
        params: of the layer.
        states: [slots + 1, H, D, V] float32, contiguous; brought up to date.
        step: the sequences.

    Returns:
        [T, H, V] in qkv's dtype, computed in float32.

    Raises:
        ValueError: a slot is out of range, or H is no multiple of K.
    """
    num_slots, heads, key_dim, value_dim = states.shape
    key_heads = (qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    decay = (-softplus(a.float() + params.dt_bias.float()) * params.a_log.float().exp()).exp_()
    beta = (-b.float()).exp_().add_(1.0).reciprocal_()
    wide, library = qkv.float(), kernels()
    out = torch.empty(qkv.shape[0], heads, value_dim, dtype=torch.float32, device=qkv.device)
    is_native = library is not None and qkv.is_cpu and states.is_contiguous() and states.dtype == torch.float32
    if not is_native:
        sizes = (key_heads * key_dim, key_heads * key_dim, heads * value_dim)
        q, k, v = (part.unflatten(1, (-1, states.shape[axis])) for part, axis in zip(wide.split(sizes, 1), (2, 2, 3)))
        _run(_normalized(q) * key_dim**-0.5, _normalized(k), v, decay, beta, states, step, out)
        return out.to(qkv.dtype)
    wide = wide if wide.stride(1) == 1 else wide.contiguous()
    decay, beta = decay.contiguous(), beta.contiguous()
    slots, starts = step.slots.int().contiguous(), sequence_starts(step).int().contiguous()
    status = library.lamella_gated_delta_rule(
        wide.data_ptr(), decay.data_ptr(), beta.data_ptr(), states.data_ptr(), slots.data_ptr(), starts.data_ptr(),
        step.is_first.contiguous().data_ptr(), out.data_ptr(), slots.shape[0], num_slots, key_heads, heads, key_dim,
        value_dim, wide.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    check_status("gated_delta_rule", status)
    return out.to(qkv.dtype)


def _normalized(x: Tensor) -> Tensor:
    """Returns x [T, heads, D] divided by the length of each head's vector."""
    return x * torch.rsqrt(tree_sum(x * x) + LEAST_SQUARE).unsqueeze(-1)


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, states: Tensor, step: RecurrentStep, out: Tensor
) -> None:
    """`gated_delta_rule` through PyTorch, token by token, of normalized q and k; all float32."""
    repeats, bounds = v.shape[1] // k.shape[1], sequence_starts(step).tolist()
    for i, (slot, is_first) in enumerate(zip(step.slots.tolist(), step.is_first.tolist(), strict=True)):
        h = torch.zeros_like(states[slot]) if is_first else states[slot]  # [H, D, V]
        for t in range(bounds[i], bounds[i + 1]):
            query, key = (x[t].repeat_interleave(repeats, 0).unsqueeze(-1) for x in (q, k))  # [H, D, 1]
            h = h * decay[t, :, None, None]
            delta = beta[t, :, None] * (v[t] - tree_sum((h * key).transpose(1, 2)))
            h = h + key * delta.unsqueeze(1)
            out[t] = tree_sum((h * query).transpose(1, 2))
        states[slot] = h
