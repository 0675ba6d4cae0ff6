"""Makes triton's interpreter compute what a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np


def round_bfloat16_to_nearest() -> None:
    """Replaces the interpreter's truncation of float32 to bfloat16 by rounding to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    interpreter._convert_float = convert_float
