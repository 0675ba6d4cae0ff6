"""One thread per process: the tests' models are tiny, and threads that wait for each other only cost time.

Tests of threading itself set their own number.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
