"""The C interface of the native kernels: argument types, dtype codes and status codes."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lamella_core.kernels.cpu.build import native_library

P, I64, I32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

NativeFunction = Callable[..., int]

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

SIGNATURES: dict[str, list[type]] = {
    # x, w, bias, out, m, n, k, x_stride, dtype, bias_dtype, out_dtype, threads
    "lamella_matmul_panels": [P, P, P, P, I64, I64, I64, I64, I32, I32, I32, I32],
    "lamella_gemv_rows": [P, P, P, P, I64, I64, I64, I64, I32, I32, I32, I32],
    # threads
    "lamella_team_size": [I32],
    # x, residual, weight, y, sum_out, rows, hidden, eps, dtype, threads
    "lamella_rms_norm": [P, P, P, P, P, I64, I64, F32, I32, I32],
    # gate_up, out, rows, size, stride, dtype, threads
    "lamella_silu_and_mul": [P, P, I64, I64, I64, I32, I32],
    # q, k, cos, sin, tokens, q_heads, kv_heads, head_dim, rotary_dim, q_stride, k_stride, interleaved, dtype, threads
    "lamella_rope": [P, P, P, P, I64, I64, I64, I64, I64, I64, I64, I32, I32, I32],
    # k, v, k_cache, v_cache, slots, tokens, kv_heads, head_dim, block_size, num_blocks, k_stride, v_stride, item_bytes
    "lamella_write_kv": [P, P, P, P, P, I64, I64, I64, I64, I64, I64, I64, I64],
    # q, k_cache, v_cache, out, block_tables, query_start, context_lens, prefix_lens, alibi_slopes, sink_logits, tokens,
    # q_heads, kv_heads, head_dim, q_stride, num_seqs, max_blocks, num_blocks, block_size, window, chunked, num_sinks,
    # sparse_block, local_blocks, vert_stride, first_offset, head_step, value_dim, rounds_alibi, scale, softcap, dtype,
    # threads
    "lamella_paged_attention": [P] * 10 + [I64] * 19 + [F32, F32, I32, I32],
    # x, dt, a, b, c, d, states, slots, starts, is_first, y, sequences, num_slots, heads, head_dim, size, groups,
    # a_size, x_stride, dt_stride, bc_stride, threads
    "lamella_state_scan": [P] * 11 + [I64] * 10 + [I32],
    # qkv, decay, beta, states, slots, starts, is_first, y, sequences, num_slots, k_heads, v_heads, k_dim, v_dim,
    # stride, threads
    "lamella_gated_delta_rule": [P] * 8 + [I64] * 7 + [I32],
    # calls, count, width, failed
    "lamella_replay": [P, I64, I64, P],
}

# Kernels that `lamella_replay` can call; a kernel's place is its code there.
RECORDABLE = (
    "lamella_matmul_panels",
    "lamella_gemv_rows",
    "lamella_rms_norm",
    "lamella_silu_and_mul",
    "lamella_rope",
    "lamella_write_kv",
    "lamella_paged_attention",
)

_observed = threading.local()  # .library: what this thread's `kernels` returns instead of the library


def kernels() -> Any:
    """The native library (`ctypes.CDLL`), or None when only the torch fallbacks serve; see `observed`."""
    return getattr(_observed, "library", None) or _library()


@contextmanager
def observed(library: object) -> Iterator[None]:
    """Within the block this thread's operations call the functions of ``library``, which passes them on."""
    _observed.library = library
    try:
        yield
    finally:
        del _observed.library


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The native library with its functions declared."""
    library = native_library()
    if library is not None:
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = I32
    return library


def check_status(name: str, status: int) -> None:
    """Turn the status code of a native call into an exception.

    Raises:
        MemoryError: scratch memory could not be had.
        ValueError: the kernel does not know the dtype or shape.
    """
    if status == 0:
        return
    if status == 1:
        raise MemoryError(f"{name}: no memory for the kernel's scratch buffers; free some or lower max_num_tokens")
    problem = "unknown dtype" if status == 2 else "a shape, length, block id or slot is out of range"
    raise ValueError(f"{name}: {problem} (status {status}); nothing else of the call's output can be trusted")


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element, null for None."""
    return None if tensor is None else tensor.data_ptr()
