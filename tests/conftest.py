"""What must be settled before torch and triton are imported; subprocesses inherit it.

One thread per process: the tests' models are tiny, and threads that wait for each other only cost time. Tests of
threading itself set their own number. Ctrl-C works as it does for a user, also where the run itself was started in the
background of a shell, which ignores it. Without a GPU, Triton kernels run in triton's interpreter, which has to be
chosen before anything imports triton (transformers does).

What is imported stays, so the garbage collector need not look at it: hundreds of thousands of objects, time and again.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()

import torch  # noqa: E402
from tests.support.warm_python import WarmPython  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
gc.freeze()
gc.enable()


def pytest_collection_finish() -> None:
    """All tests are imported, and with them what they test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Starts Python processes that begin with PyTorch imported, and nothing of Lamella."""
    python = WarmPython("torch")
    yield python
    python.close()
