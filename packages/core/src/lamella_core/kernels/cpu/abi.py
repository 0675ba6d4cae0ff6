"""The C interface of the native kernels: argument types, dtype codes and status codes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from lamella_core.kernels.cpu.build import native_library

P, I64, I32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

NativeFunction = Callable[..., int]

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

SIGNATURES: dict[str, list[type]] = {
    # x, w, bias, out, m, n, k, x_stride, dtype, bias_dtype, out_dtype, threads
    "lamella_matmul_panels": [P, P, P, P, I64, I64, I64, I64, I32, I32, I32, I32],
    "lamella_gemv_rows": [P, P, P, P, I64, I64, I64, I64, I32, I32, I32, I32],
}


@functools.lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL | None:
    """The native library with its functions declared, or None when only the torch fallbacks serve."""
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
    raise ValueError(f"{name}: {'unknown dtype' if status == 2 else 'unsupported shape'} (status {status})")
