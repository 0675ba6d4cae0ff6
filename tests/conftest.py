"""What must be settled before torch and triton are imported; subprocesses inherit it.

One thread per process: the tests' models are tiny, and threads that wait for each other only cost time. Tests of
threading itself set their own number. Ctrl-C works as it does for a user, also where the run itself was started in the
background of a shell, which ignores it. Without a GPU, Triton kernels run in triton's interpreter, which has to be
chosen before anything imports triton (transformers does).
"""

from __future__ import annotations

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
