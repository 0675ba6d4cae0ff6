"""CPU operations of state-space layers: causal convolution and selective scan over packed sequences.

Legend: T tokens, S sequences, C channels, W width of the convolution; H heads of P channels with states of N numbers,
G groups of heads that share b and c. In float32 a sequence has the same results and states, bit by bit, however its
tokens are divided into calls, and whatever runs beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu.abi import check_status, kernels

_SOFTPLUS_LINEAR = 20.0  # above, softplus(x) is x


@dataclass(frozen=True)
class ScanParameters:
    """The weights of a selective scan, float32 on the scan's device."""

    a_log: Tensor  # [H, N] or [H]: states decay at the rate exp(a_log)
    d: Tensor  # [H], what of x goes straight to the result
    dt_bias: Tensor  # [H], added to dt before softplus
    dt_min: float = 0.0
    dt_max: float | None = None  # None: no bound


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, step: RecurrentStep) -> Tensor:
    """Convolves each channel with its last W inputs, then SiLU.

    Args:
        x: [T, C].
        weight: [C, W] of x's dtype.
        bias: [C] or None.
        windows: [slots + 1, C, W - 1] of x's dtype, the inputs before this step, oldest first; brought up to date.
        step: the sequences.

    Returns:
        [T, C] in x's dtype, computed in float32.
    """
    starts, slots = sequence_starts(step), step.slots.long()
    num_before = weight.shape[1] - 1
    before = windows[slots].masked_fill(step.is_first[:, None, None], 0.0).transpose(1, 2)  # [S, W - 1, C]
    lengths = (starts[1:] - starts[:-1]).long()
    owners = torch.repeat_interleave(torch.arange(slots.shape[0], device=x.device), lengths, output_size=x.shape[0])
    places = torch.arange(x.shape[0], device=x.device) + (owners + 1) * num_before  # of tokens among inputs and windows
    firsts = starts[:-1].long() + torch.arange(slots.shape[0], device=x.device) * num_before
    earlier = torch.arange(num_before, device=x.device)
    inputs = x.new_empty(x.shape[0] + slots.shape[0] * num_before, x.shape[1])
    inputs[places] = x
    inputs[firsts[:, None] + earlier] = before
    windows[slots] = inputs[(firsts + lengths)[:, None] + earlier].transpose(1, 2)
    wide, taps = inputs.float(), weight.float()
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if bias is None else bias.float().expand(x.shape)
    for tap in range(num_before + 1):
        total = total + wide[places - (num_before - tap)] * taps[:, tap]
    return (total / (-total).exp_().add_(1.0)).to(x.dtype)


def selective_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, params: ScanParameters, states: Tensor, step: RecurrentStep
) -> Tensor:
    """Runs the recurrence h = exp(dt a) h + dt x b, y = <h, c> + d x over each sequence (Gu and Dao 2023).

    Here dt is softplus(dt + dt_bias) within its bounds, and a = -exp(a_log).

    Args:
        x: [T, H, P].
        dt: [T, H].
        b: [T, G, N].
        c: [T, G, N].
        params: of the layer.
        states: [slots + 1, H, P, N] float32, contiguous; brought up to date.
        step: the sequences.

    Returns:
        [T, H, P] in x's dtype, computed in float32.

    Raises:
        ValueError: a slot is out of range.
    """
    heads, size = x.shape[1], b.shape[2]
    a = -params.a_log.float().exp().view(heads, -1)
    steps = softplus(dt.float() + params.dt_bias.float())
    if params.dt_min > 0.0 or params.dt_max is not None:
        steps = steps.clamp(params.dt_min, params.dt_max)
    library, starts, d = kernels(), sequence_starts(step), params.d.float()
    wide_x, wide_b, wide_c = (tensor.float().contiguous() for tensor in (x, b, c))
    is_native = library is not None and x.is_cpu and states.is_contiguous() and states.dtype == torch.float32
    if not is_native:
        return _scan(wide_x, steps, a, wide_b, wide_c, d, states, step).to(x.dtype)
    out = torch.empty_like(wide_x)
    a, steps, d = a.contiguous(), steps.contiguous(), d.contiguous()
    slots, starts, is_first = step.slots.int().contiguous(), starts.int().contiguous(), step.is_first.contiguous()
    status = library.lamella_state_scan(
        wide_x.data_ptr(), steps.data_ptr(), a.data_ptr(), wide_b.data_ptr(), wide_c.data_ptr(), d.data_ptr(),
        states.data_ptr(), slots.data_ptr(), starts.data_ptr(), is_first.data_ptr(), out.data_ptr(),
        slots.shape[0], states.shape[0], heads, x.shape[2], size, b.shape[1], a.shape[1],
        wide_x.stride(0), steps.stride(0), wide_b.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    check_status("selective_scan", status)
    return out.to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), of functions whose bits do not depend on where a value lies in the tensor."""
    return torch.where(x > _SOFTPLUS_LINEAR, x, x.clamp(max=_SOFTPLUS_LINEAR).exp_().log1p_())


def sequence_starts(step: RecurrentStep) -> Tensor:
    """Returns the first token of every sequence, and the end of the last: [S + 1] int32."""
    num_decode, device = step.num_decode, step.slots.device
    if num_decode == step.slots.shape[0]:
        return torch.arange(num_decode + 1, dtype=torch.int32, device=device)
    if not num_decode:
        return step.query_start
    singles = torch.arange(num_decode, dtype=torch.int32, device=device)
    return torch.cat((singles, step.query_start + num_decode))


def _scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, step: RecurrentStep
) -> Tensor:
    """`selective_scan` through PyTorch, token by token; all float32."""
    out = torch.empty_like(x)
    repeats = x.shape[1] // b.shape[1]
    bounds = sequence_starts(step).tolist()
    for i, (slot, is_first) in enumerate(zip(step.slots.tolist(), step.is_first.tolist(), strict=True)):
        h = torch.zeros_like(states[slot]) if is_first else states[slot]  # [H, P, N]
        for t in range(bounds[i], bounds[i + 1]):
            decay = (dt[t, :, None] * a).exp()[:, None, :]  # [H, 1, N] or [H, 1, 1]
            inputs = (dt[t, :, None] * x[t])[:, :, None] * b[t].repeat_interleave(repeats, 0)[:, None, :]
            h = h * decay + inputs
            out[t] = tree_sum(h * c[t].repeat_interleave(repeats, 0)[:, None, :]) + d[:, None] * x[t]
        states[slot] = h
    return out


def tree_sum(x: Tensor) -> Tensor:
    """Sums the last dimension in an order that depends on its size alone."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        rest = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((x, rest), dim=-1) if rest.shape[-1] else x
    return x[..., 0]
