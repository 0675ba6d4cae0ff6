"""Compiles the kernels that some calls would launch, to machine code of a GPU that need not be there.

    python -m tests.support.triton_compiler CAPABILITY MODULE

runs ``MODULE.calls()`` with CPU tensors, TRITON_INTERPRET unset, and prints the name of each kernel it compiled. Below
90 only the first variant of each kernel is compiled.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compile_in_subprocess(capability: int, module: str, cache: Path) -> list[str]:
    """Returns the names of the kernels that ``module.calls()`` launches, compiled for ``capability`` (90: sm_90).

    Raises:
        AssertionError: something does not compile; the message is the compiler's.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "tests.support.triton_compiler", str(capability), module]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.split()


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
    from triton.runtime.jit import JITFunction

    from lamella_core.kernels.triton import launch

    triton.runtime.driver.set_active(_Driver(capability))
    launch._capability = lambda: divmod(capability, 10)
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


if __name__ == "__main__":
    main()
