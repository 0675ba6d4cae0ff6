"""Makes triton's interpreter compute what a GPU does, with the installed numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


def repair_interpreter() -> None:
    """Rounds float32 to bfloat16 to nearest even (the interpreter truncates); multiplies bfloat16 matrices (it takes
    their bits for integers); lets tensors bound a range (numpy 2.4).
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor
    multiply = interpreter.InterpreterBuilder.create_dot

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        values = convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return multiply(self, widened(a), widened(b), d, *options)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_lang_tensor
