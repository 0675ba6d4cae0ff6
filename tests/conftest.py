"""What must be settled before torch and triton are imported; subprocesses inherit it.

One thread per process: the tests' models are tiny, and threads that wait for each other only cost time. Tests of
threading itself set their own number. Without a GPU, Triton kernels run in triton's interpreter, which has to be chosen
before anything imports triton (transformers does).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
