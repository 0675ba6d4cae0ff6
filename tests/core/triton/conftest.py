"""Where GPU kernels are tested: on the GPU if there is one, else in triton's interpreter on the CPU.

The interpreter must be chosen before triton is first imported. Its conversion from float32 to bfloat16 truncates; here
it rounds to nearest even, as every GPU does.
"""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="GPU kernels need triton")

if not ON_GPU:
    from tests.support.triton_interpreter import round_bfloat16_to_nearest

    round_bfloat16_to_nearest()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors that kernels take live: "cuda", or "cpu" for the interpreter."""
    return "cuda" if ON_GPU else "cpu"
