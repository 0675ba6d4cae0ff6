"""Memory of a CPU that is reserved but not touched: the machine provides pages as they are first written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; a vector load never straddles two cache lines


def reserve(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns zeros whose pages are not in memory yet (numpy's come from calloc), aligned to cache lines."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(shape)
