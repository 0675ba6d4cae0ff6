"""CPU operations: checked arguments in, native kernel if there is one for them, torch fallback otherwise.

Legend: M or T rows (tokens), K input features, N output features, H hidden size, Hq query heads, Hkv key/value heads,
D head size, S sequences. `reference` holds what each operation means, with the same signatures. float32 results of a
row do not depend on the other rows of the call, on its position among them or on the number of threads. No operation
records gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.cpu.abi import DTYPE_CODES, NativeFunction, check_status, kernels, pointer
from lamella_core.kernels.cpu.attention import paged_attention, rope_inplace, write_kv
from lamella_core.kernels.cpu.reference import PANEL, pack_panels, panel_rows, unpack_panels

__all__ = [
    "PANEL",
    "gemv_rows",
    "matmul_panels",
    "pack_panels",
    "paged_attention",
    "panel_rows",
    "rms_norm",
    "rope_inplace",
    "silu_and_mul",
    "unpack_panels",
    "write_kv",
]


def _check_bias(bias: Tensor | None, n: int) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, needs ({n},)")
    return bias.contiguous()


def _check_rows(x: Tensor, w: Tensor, k: int) -> Tensor:
    """Common checks of a product's operands; returns x with unit stride along K."""
    if not (x.dim() == 2 and x.shape[1] == k):
        raise ValueError(f"x has shape {tuple(x.shape)}, needs [M, {k}] for this weight")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {w.dtype}; cast x to the weight's dtype")
    if not (x.is_cpu and w.is_cpu):
        raise ValueError(f"x is on {x.device} and the weight on {w.device}; both need cpu")
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"x is {x.dtype}, needs one of {', '.join(map(str, DTYPE_CODES))}")
    if not w.is_contiguous():
        raise ValueError("the weight is not contiguous; call .contiguous() once after loading it")
    return x if x.stride(1) == 1 else x.contiguous()


def _call_matmul(
    function: NativeFunction, x: Tensor, w: Tensor, n: int, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Call a native product: both kernels take the same arguments, the weight's layout aside."""
    out = x.new_empty(x.shape[0], n, dtype=out_dtype)
    bias_dtype = x.dtype if bias is None else bias.dtype
    status = function(
        x.data_ptr(), w.data_ptr(), pointer(bias), out.data_ptr(),
        x.shape[0], n, x.shape[1], x.stride(0),
        DTYPE_CODES[x.dtype], DTYPE_CODES[bias_dtype], DTYPE_CODES[out_dtype], torch.get_num_threads(),
    )  # fmt: skip
    check_status("matmul", status)
    return out


def matmul_panels(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Multiply x [M, K] by a panel16 weight [ceil(n/16), K, 16] of n output features, plus bias [n].

    Args:
        x: float32, bfloat16 or float16, the dtype of ``packed``.
        packed: weight in panel16 layout, contiguous.
        n: output features (the last panel may be padded).
        bias: added before rounding; any of the three dtypes.
        out_dtype: dtype of the result, by default that of x.

    Returns:
        [M, n], accumulated in float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if not (packed.dim() == 3 and packed.shape[2] == PANEL):
        raise ValueError(f"weight of shape {tuple(packed.shape)} is not panel16")
    panels, k, _ = packed.shape
    if not (0 < n <= panels * PANEL < n + PANEL):
        raise ValueError(f"n={n} does not fit {panels} panels of {PANEL}")
    x, bias = _check_rows(x, packed, k), _check_bias(bias, n)
    library = kernels()
    if library is None or k == 0:
        return reference.matmul_panels(x, packed, n, bias, out_dtype)
    return _call_matmul(library.lamella_matmul_panels, x, packed, n, bias, out_dtype or x.dtype)


def gemv_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [M, K] by a row-major weight [N, K] transposed, plus bias [N]: [M, N], accumulated in float32.

    Made for few rows: the weight is streamed once per four rows of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if w.dim() != 2:
        raise ValueError(f"weight of shape {tuple(w.shape)} is not [N, K]")
    n, k = w.shape
    x, bias = _check_rows(x, w, k), _check_bias(bias, n)
    library = kernels()
    if library is None or k == 0:
        return reference.gemv_rows(x, w, bias)
    return _call_matmul(library.lamella_gemv_rows, x, w, n, bias, x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of x (plus residual), as Hugging Face models compute it.

    Args:
        x: [T, H].
        weight: [H]; multiplied after the cast back to x's dtype.
        eps: added to the mean square.
        residual: [T, H], added first and rounded to x's dtype.
        unit_offset: multiply by 1 + weight instead, before the cast.

    Returns:
        The normed rows, and the sum that was normed (x itself without a residual): both [T, H].

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    if not (x.dim() == 2 and weight.shape == x.shape[1:]):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} differ")
    if not (residual is None or residual.shape == x.shape):
        raise ValueError("residual and x differ in shape")
    if unit_offset:
        total = x if residual is None else x + residual
        return rms_norm(total.float(), weight.float() + 1.0, eps)[0].to(x.dtype), total
    library, dtype = kernels(), x.dtype
    same = weight.dtype == dtype and (residual is None or residual.dtype == dtype)
    if library is None or not same or dtype not in DTYPE_CODES or not (x.is_cpu and weight.is_cpu):
        return reference.rms_norm(x, weight, eps, residual)
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    status = library.lamella_rms_norm(
        x.data_ptr(), pointer(residual), weight.data_ptr(), y.data_ptr(), total.data_ptr(),
        x.shape[0], x.shape[1], eps, DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check_status("rms_norm", status)
    return y, total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Gated activation silu(gate) * up of rows [gate, up].

    Args:
        gate_up: [T, 2I].

    Returns:
        [T, I] in the same dtype, computed in float32.

    Raises:
        ValueError: the last dimension is odd.
    """
    if not (gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0):
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, needs [T, 2I]")
    library = kernels()
    if library is None or gate_up.dtype not in DTYPE_CODES or not gate_up.is_cpu:
        return reference.silu_and_mul(gate_up)
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    status = library.lamella_silu_and_mul(
        gate_up.data_ptr(), out.data_ptr(), rows, size, gate_up.stride(0),
        DTYPE_CODES[gate_up.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check_status("silu_and_mul", status)
    return out
