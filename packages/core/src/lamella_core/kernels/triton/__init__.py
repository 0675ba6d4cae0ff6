"""GPU kernels in Triton. They run on any CUDA GPU that triton serves, and on a CPU under ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import functools
from importlib.util import find_spec


@functools.cache
def is_available() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None
