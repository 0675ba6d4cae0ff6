"""GPU kernels in Triton. They run on any CUDA GPU that triton serves, and on a CPU under ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import functools
from importlib.util import find_spec

# What `sampling.sample` writes in place of a token when a row's logits cannot be sampled. Kept here, where triton is
# not imported.
NAN_LOGITS = -2
POSITIVE_INFINITE_LOGITS = -3
NEGATIVE_INFINITE_LOGITS = -4  # every token is banned


@functools.cache
def is_available() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None
