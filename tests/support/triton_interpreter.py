"""Makes triton's interpreter compute what a GPU does, with the installed numpy, and in less time."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np


def repair_interpreter() -> None:
    """Replaces what is wrong or slow in the interpreter of triton 3.6.

    float32 becomes bfloat16 by rounding to nearest even (not by truncation); tensors bound a range (with numpy 2.4
    they do not); bfloat16 matrices are multiplied as such (not their bits as integers); modules are searched for
    functions to patch once, not at each call of each jitted function.
    """
    from triton.runtime import interpreter

    interpreter._convert_float = _rounding(interpreter._convert_float)
    interpreter.InterpreterBuilder.create_dot = _widening(interpreter.InterpreterBuilder.create_dot)
    interpreter._patch_lang_tensor = _indexable(interpreter._patch_lang_tensor)
    interpreter._patch_builtin = _remembering(interpreter._patch_attr)


def _rounding(convert: Any) -> Any:
    import triton.language as tl

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    return convert_float


def _widening(multiply: Any) -> Any:
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return multiply(self, widened(a), widened(b), d, *options)

    return create_dot


def _indexable(patch: Any) -> Any:
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor


def _remembering(patch_attr: Any) -> Any:
    """Patches what is still unpatched; scopes nest, one per jitted function that runs."""
    from triton.language import core

    found: dict[int, list[tuple[str, Any]]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if id(package) not in found:
            found[id(package)] = [pair for pair in inspect.getmembers(package) if core.is_builtin(pair[1])]
        for name, member in found[id(package)]:
            if getattr(package, name) is member:
                patch_attr(package, name, member, builder, scope)

    return patch_builtin
