"""Compiles the kernels that some calls would launch, to machine code of a GPU that need not be there.

    python -m tests.support.triton_compiler CAPABILITY MODULE

runs ``MODULE.calls()`` with CPU tensors, TRITON_INTERPRET unset, and prints the name of each kernel it compiled. Below
90 only the first variant of each kernel is compiled.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.warm_python import WarmPython

ROOT = Path(__file__).resolve().parents[2]


class Compiler:
    """Compiles in processes of their own, which begin with triton and the kernels imported."""

    def __init__(self) -> None:
        self._environment = {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}  # nobody reads lines of code
        names = ("attention", "state_space", "matmul", "moe", "glue", "all_reduce")
        with mock.patch.dict(os.environ, self._environment):
            self._python = WarmPython("triton", *(f"tests.support.{name}_calls" for name in names))

    def compile(self, capability: int, module: str, cache: Path) -> list[str]:
        """Returns the names of the kernels that ``module.calls()`` launches, compiled for ``capability`` (90: sm_90).

        Raises:
            AssertionError: something does not compile; the message is the compiler's.
        """
        result = self._python.run(
            "from tests.support.triton_compiler import main\nmain()", str(capability), module,
            cwd=ROOT, env={**self._environment, "TRITON_CACHE_DIR": str(cache)}, timeout=240,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout.split()

    def close(self) -> None:
        self._python.close()


class _Driver:
    """What a launch asks of the driver before it compiles."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    capability, module = int(sys.argv[1]), sys.argv[2]
    import triton
    from triton.language.semantic import TritonSemantic
    from triton.runtime.jit import JITFunction

    from lamella_core.kernels.triton import launch

    triton.runtime.driver.set_active(_Driver(capability))
    launch._capability = lambda: divmod(capability, 10)
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None  # code that nothing uses: it ends in no assertion
    run = JITFunction.run

    done: dict[str, Any] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = self.fn.__name__
        if capability < 90 and name in done:
            return done[name]
        done[name] = run(self, *args, grid=grid, warmup=True, **options)
        sys.stdout.write(name + "\n")
        return done[name]

    JITFunction.run = compile_only
    importlib.import_module(module).calls()
    sys.stdout.flush()
    os._exit(0)  # PyTorch's part in an interpreter's end takes a while


if __name__ == "__main__":
    main()
