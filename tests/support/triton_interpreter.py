"""Makes triton's interpreter compute what a GPU does, with the installed numpy, and in less time."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np


def repair_interpreter() -> None:
    """Replaces what is wrong or slow in the interpreter of triton 3.6.

    float32 becomes bfloat16 by rounding to nearest even (not by truncation); tensors bound a range (with numpy 2.4
    they do not); bfloat16 matrices are multiplied as such (not their bits as integers). What is computed again and
    again, and always the same, is computed once: which functions to patch, what is known of a type or a shape. What
    would only be thrown away is not computed: whether integers overflow (the interpreter asserts nothing of them).
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if hasattr(interpreter, "_is_repaired"):
        return
    interpreter._is_repaired = True
    interpreter._convert_float = _rounding(interpreter._convert_float)
    interpreter.InterpreterBuilder.create_dot = _widening(interpreter.InterpreterBuilder.create_dot)
    interpreter._patch_lang_tensor = _indexable(interpreter._patch_lang_tensor)
    interpreter._patch_builtin = _remembering(interpreter._patch_attr)
    interpreter._patch_lang = _outermost(interpreter._patch_lang)
    interpreter._get_np_dtype = _named(interpreter._get_np_dtype)
    if not interpreter.interpreter_builder.options.debug:
        TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    _remember_shapes()


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


def _outermost(patch_lang: Any) -> Any:
    """Patches at the launch of a kernel, which restores all: the functions that it calls find most of it done."""
    from triton import language
    from triton.language import core

    modules: dict[Any, set[str]] = {}  # that a function sees
    seen: set[str] = set()  # modules that are patched
    scopes: list[Any] = []

    class Launch:
        def restore(self) -> None:
            while scopes:
                scopes.pop().restore()
            seen.clear()

    launch = Launch()

    def patch(function: Any) -> Launch:
        if function not in modules:
            values = function.__globals__.values()
            modules[function] = {value.__name__ for value in values if value is language or value is core}
        if not modules[function] <= seen:
            scopes.append(patch_lang(function))
            seen.update(modules[function])
        return launch

    return patch


def _named(get_np_dtype: Any) -> Any:
    found: dict[str, np.dtype] = {}

    def by_name(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in found:
            found[name] = get_np_dtype(dtype)
        return found[name]

    return by_name


def _remember_shapes() -> None:
    """Checks and names a block's type once, and wraps a shape once; neither changes after that."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    init_type = core.block_type.__init__
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if type(size) is core.constexpr else size for size in shape]
        key = (element_ty.name, *sizes)
        if key not in types:
            init_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key], element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    core.block_type.__init__ = init_block_type
    core.block_type.to_ir = lambda self, builder: self
    core.tensor.__init__ = init_tensor
    broadcast = TritonSemantic.broadcast_impl_value
    TritonSemantic.broadcast_impl_value = lambda self, a, b: (a, b) if a.shape is b.shape else broadcast(self, a, b)
