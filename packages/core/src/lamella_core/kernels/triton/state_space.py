"""State-space layers on GPUs: causal convolution, and the selective scan in three forms.

Single tokens, and prompts of layers whose every channel decays by itself (Mamba), go token by token. Prompts of layers
whose heads decay as a whole (Mamba-2) go in chunks of matrix products, "state space duality" (Dao and Gu 2024), one
program per sequence and head that carries the state from chunk to chunk. Nothing waits for the device, and launches of
steps of single tokens depend on shapes alone, so they can be captured. `lamella_core.kernels.cpu.state_space` says what
each operation means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu.state_space import ScanParameters
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl

CONV_TOKENS = 16  # of one program; at least the width of a convolution
CONV_CHANNELS = 128
SCAN_VALUES = 2048  # of a state that one program holds: rows times N
CHUNK = 64  # tokens of one step of the chunked scan
HEAD_BLOCK = 64  # channels of a head that one program scans
_LEAST_DOT = 16  # smallest side of a matrix product


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e^x) with a small relative error, also where e^x is lost beside 1."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def token_bounds(query_start_ptr, sequence, first, IS_DECODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first token of one of the launch's sequences and that after its last; ``first`` tokens stand before them."""
    if IS_DECODE:
        begin = sequence
        end = sequence + 1
    else:
        begin = first + tl.load(query_start_ptr + sequence)
        end = first + tl.load(query_start_ptr + sequence + 1)
    return begin, end


@triton.jit(do_not_specialize=["first"])
def _conv_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, windows_ptr, slots_ptr, is_first_ptr, query_start_ptr, out_ptr,
    first, x_stride, channels,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, IS_DECODE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of a sequence and BLOCK_C channels per program; that of the first tokens keeps the window."""
    BEFORE: tl.constexpr = WIDTH - 1
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence, block = tl.program_id(0), tl.program_id(1)
    begin, end = token_bounds(query_start_ptr, sequence, first, IS_DECODE)
    start = begin + block * BLOCK_T
    if start >= end:
        return
    is_fresh = tl.load(is_first_ptr + first + sequence if not IS_DECODE else is_first_ptr + sequence) != 0
    slot = tl.load(slots_ptr + first + sequence if not IS_DECODE else slots_ptr + sequence).to(tl.int64)
    lane = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = lane < channels
    window_ptr = windows_ptr + (slot * channels + lane) * BEFORE
    tokens = start + tl.arange(0, BLOCK_T)
    mask = (tokens < end)[:, None] & in_channels[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + lane, in_channels, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        source = tokens - (BEFORE - tap)
        is_here = (source >= begin)[:, None]
        value = tl.load(x_ptr + source.to(tl.int64)[:, None] * x_stride + lane[None, :], mask & is_here, other=0.0)
        place = source - begin + BEFORE
        kept = mask & (is_here == 0) & (is_fresh == 0)
        earlier = tl.load(window_ptr[None, :] + place[:, None], kept, other=0.0)
        weight = tl.load(weight_ptr + lane * WIDTH + tap, in_channels, other=0.0).to(tl.float32)
        total += (value.to(tl.float32) + earlier.to(tl.float32)) * weight[None, :]
    out = total / (1.0 + tl.exp(-total))
    out_at = out_ptr + tokens.to(tl.int64)[:, None] * channels + lane[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask)
    if block == 0:
        tl.debug_barrier()  # other threads have read the window's old values
        for spot in tl.static_range(BEFORE):
            token = end - BEFORE + spot
            here = in_channels & (token >= begin)
            older = in_channels & (token < begin) & (is_fresh == 0)
            last = tl.load(x_ptr + token.to(tl.int64) * x_stride + lane, here, other=0.0)
            last += tl.load(window_ptr + (token - begin + BEFORE), older, other=0.0)
            tl.store(window_ptr + spot, last, in_channels)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, step: RecurrentStep) -> Tensor:
    """See `lamella_core.kernels.cpu.state_space.causal_conv1d`; values of a token lie side by side in ``x``."""
    channels, width = weight.shape
    weight = weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_others = step.slots.shape[0] - step.num_decode
    for is_decode, count in ((True, step.num_decode), (False, num_others)):
        if not count:
            continue
        block = 1 if is_decode else CONV_TOKENS
        grid = (count, 1 if is_decode else -(-step.max_query_len // block), -(-channels // CONV_CHANNELS))
        _conv_kernel[grid](
            x, weight, weight if bias is None else bias, windows, step.slots, step.is_first.view(torch.uint8),
            step.query_start, out, step.num_decode, x.stride(0), channels,
            WIDTH=width, HAS_BIAS=bias is not None, IS_DECODE=is_decode, BLOCK_T=block, BLOCK_C=CONV_CHANNELS,
            USE_PDL=use_pdl(), num_warps=4, **launch_options(),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["first"])
def _scan_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, b_ptr, c_ptr, a_log_ptr, d_ptr, dt_bias_ptr, states_ptr, slots_ptr, is_first_ptr, query_start_ptr,
    out_ptr, first, x_stride, dt_stride, bc_stride, dt_min, dt_max,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, A_SIZE: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, IS_DECODE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS channels of a sequence per program, token by token: with P = 1 of as many heads, else of one head."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence, block = tl.program_id(0), tl.program_id(1)
    begin, end = token_bounds(query_start_ptr, sequence, first, IS_DECODE)
    if not IS_DECODE:
        sequence += first
    is_fresh = tl.load(is_first_ptr + sequence) != 0
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if P == 1:
        rows = block * ROWS + tl.arange(0, ROWS)
        heads = rows
        in_rows = rows < H
    else:
        BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
        inside = block % BLOCKS * ROWS + tl.arange(0, ROWS)
        rows = block // BLOCKS * P + inside
        heads = rows * 0 + block // BLOCKS
        in_rows = inside < P
    group = 0 if G == 1 else (block // ((P + ROWS - 1) // ROWS)) // (H // G)
    n = tl.arange(0, BLOCK_N)
    in_state = in_rows[:, None] & (n < N)[None, :]
    state_at = states_ptr + (slot * (H * P) + rows)[:, None] * N + n[None, :]
    state = tl.load(state_at, in_state & (is_fresh == 0), other=0.0)
    if A_SIZE == 1:
        a = -tl.exp(tl.load(a_log_ptr + heads, in_rows, other=0.0))[:, None]
    else:
        a = -tl.exp(tl.load(a_log_ptr + heads[:, None] * N + n[None, :], in_state, other=0.0))
    d = tl.load(d_ptr + heads, in_rows, other=0.0)
    dt_bias = tl.load(dt_bias_ptr + heads, in_rows, other=0.0)
    at = begin.to(tl.int64)
    x_at, out_at = x_ptr + at * x_stride + rows, out_ptr + at * (H * P) + rows
    dt_at = dt_ptr + at * dt_stride + heads
    b_at, c_at = b_ptr + at * bc_stride + group * N + n, c_ptr + at * bc_stride + group * N + n
    for _ in range(begin, end):
        x = tl.load(x_at, in_rows, other=0.0).to(tl.float32)
        dt = softplus(tl.load(dt_at, in_rows, other=0.0).to(tl.float32) + dt_bias)
        if HAS_BOUNDS:
            dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
        b = tl.load(b_at, n < N, other=0.0).to(tl.float32)
        c = tl.load(c_at, n < N, other=0.0).to(tl.float32)
        state = state * tl.exp(dt[:, None] * a) + (dt * x)[:, None] * b[None, :]
        y = tl.sum(state * c[None, :], axis=1) + d * x
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), in_rows)
        x_at, out_at, dt_at = x_at + x_stride, out_at + H * P, dt_at + dt_stride
        b_at, c_at = b_at + bc_stride, c_at + bc_stride
    tl.store(state_at, state, in_state)


@triton.jit(do_not_specialize=["first"])
def _chunk_scan_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dt_ptr, b_ptr, c_ptr, a_log_ptr, d_ptr, dt_bias_ptr, states_ptr, slots_ptr, is_first_ptr, query_start_ptr,
    out_ptr, first, x_stride, dt_stride, bc_stride, dt_min, dt_max,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, HAS_BOUNDS: tl.constexpr, L: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One head of a sequence per program (or BLOCK_P of its channels), L tokens at a time.

    Within a chunk tokens see each other as in attention, weighted by their decay; what came before is in the state.
    """
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin, end = token_bounds(query_start_ptr, sequence, first, False)
    sequence += first
    is_fresh = tl.load(is_first_ptr + sequence) != 0
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    group = head // (H // G)
    inside = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_head = inside < P
    rows = head * P + inside
    n = tl.arange(0, BLOCK_N)
    in_state = in_head[:, None] & (n < N)[None, :]
    state_at = states_ptr + (slot * (H * P) + rows)[:, None] * N + n[None, :]
    state = tl.load(state_at, in_state & (is_fresh == 0), other=0.0)
    a = -tl.exp(tl.load(a_log_ptr + head))
    d = tl.load(d_ptr + head)
    dt_bias = tl.load(dt_bias_ptr + head)
    step = tl.arange(0, L)
    for start in range(begin, end, L):
        at = start + step.to(tl.int64)
        is_token = start + step < end
        dt = softplus(tl.load(dt_ptr + at * dt_stride + head, is_token, other=0.0).to(tl.float32) + dt_bias)
        if HAS_BOUNDS:
            dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
        dt = tl.where(is_token, dt, 0.0)  # what pads a chunk neither decays nor adds
        decay = tl.cumsum(dt * a, axis=0)  # logarithm, from the chunk's beginning
        total = tl.sum(dt * a, axis=0)
        in_x = is_token[:, None] & in_head[None, :]
        in_bc = is_token[:, None] & (n < N)[None, :]
        x = tl.load(x_ptr + at[:, None] * x_stride + rows[None, :], in_x, other=0.0)
        b = tl.load(b_ptr + at[:, None] * bc_stride + group * N + n[None, :], in_bc, other=0.0)
        c = tl.load(c_ptr + at[:, None] * bc_stride + group * N + n[None, :], in_bc, other=0.0)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        weights = scores * tl.exp(decay[:, None] - decay[None, :]) * dt[None, :]
        weights = tl.where(step[:, None] >= step[None, :], weights, 0.0)
        y = tl.dot(weights.to(x.dtype), x, input_precision=PRECISION)
        before = tl.dot(c, tl.trans(state.to(c.dtype)), input_precision=PRECISION)
        y += tl.exp(decay)[:, None] * before + d * x.to(tl.float32)
        tl.store(out_ptr + at[:, None] * (H * P) + rows[None, :], y.to(out_ptr.dtype.element_ty), in_x)
        left = (x.to(tl.float32) * (tl.exp(total - decay) * dt)[:, None]).to(x.dtype)
        state = tl.exp(total) * state + tl.dot(tl.trans(left), b, input_precision=PRECISION)
    tl.store(state_at, state, in_state)


def selective_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, params: ScanParameters, states: Tensor, step: RecurrentStep
) -> Tensor:
    """See `lamella_core.kernels.cpu.state_space.selective_scan`.

    ``x`` [T, H, P] may be a view of wider rows, and so may ``dt``, ``b`` and ``c``; heads and groups adjoin. Chunks are
    multiplied in x's dtype and added up in float32.

    Raises:
        ValueError: heads of single channels in several groups, or decays by state with heads of several channels.
    """
    heads, size = x.shape[1:]
    if size == 1 and b.shape[1] != 1:
        raise ValueError(f"b has {b.shape[1]} groups; heads of a single channel share one")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if b.stride(0) != c.stride(0):
        b, c = b.contiguous(), c.contiguous()
    bounds = (params.dt_min, float("inf") if params.dt_max is None else params.dt_max)
    a_size = 1 if params.a_log.dim() == 1 else b.shape[2]
    tensors = (
        x, dt, b, c, params.a_log, params.d, params.dt_bias, states, step.slots, step.is_first.view(torch.uint8),
        step.query_start, out, step.num_decode, x.stride(0), dt.stride(0), b.stride(0), *bounds,
    )  # fmt: skip
    has_bounds = bounds != (0.0, float("inf"))
    sizes = {"H": heads, "P": size, "N": b.shape[2], "G": b.shape[1], "HAS_BOUNDS": has_bounds}
    num_others = step.slots.shape[0] - step.num_decode
    if step.num_decode:
        _launch_scan(tensors, sizes, a_size, step.num_decode, is_decode=True)
    if num_others and (a_size > 1 or size < _LEAST_DOT):
        _launch_scan(tensors, sizes, a_size, num_others, is_decode=False)
    elif num_others:
        block_p = min(HEAD_BLOCK, max(_LEAST_DOT, next_power_of_2(size)))
        _chunk_scan_kernel[(num_others, heads, -(-size // block_p))](
            *tensors, **sizes, L=CHUNK, BLOCK_P=block_p, BLOCK_N=max(_LEAST_DOT, next_power_of_2(b.shape[2])),
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", USE_PDL=use_pdl(),
            num_warps=4, num_stages=1, **launch_options(),
        )  # fmt: skip
    return out


def _launch_scan(
    tensors: tuple[Tensor | int | float, ...], sizes: dict[str, int], a_size: int, count: int, *, is_decode: bool
) -> None:
    block_n, size = next_power_of_2(sizes["N"]), sizes["P"]
    rows = max(1, SCAN_VALUES // block_n)
    if not is_decode:
        rows = max(1, rows // 4)  # more programs, which have a loop before them
    channels = sizes["H"] if size == 1 else size
    rows = min(rows, next_power_of_2(channels))
    blocks = -(-sizes["H"] // rows) if size == 1 else sizes["H"] * -(-size // rows)
    _scan_kernel[(count, blocks)](
        *tensors, **sizes, A_SIZE=a_size, IS_DECODE=is_decode, ROWS=rows, BLOCK_N=block_n, USE_PDL=use_pdl(),
        num_warps=4, **launch_options(),
    )  # fmt: skip
