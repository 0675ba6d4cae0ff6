"""Where GPU kernels are tested: on the GPU if there is one (`make test-gpu`), else in triton's interpreter on the CPU.

The interpreter must be chosen before triton is first imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.triton_compiler import Compiler

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="GPU kernels need triton")

if not ON_GPU:
    from tests.support.triton_interpreter import repair_interpreter

    repair_interpreter()


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests as GPU tests where they run on one."""
    for item in items:
        if ON_GPU and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors that kernels take live: "cuda", or "cpu" for the interpreter."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Compiles kernels for GPUs that need not be there."""
    compiler = Compiler()
    yield compiler
    compiler.close()
