"""Checksums of tensors at memory speed, and of JSON: they find damage (lost, moved or flipped bytes), not tampering.

A tensor's bytes are read as little-endian 64-bit words and summed in blocks of 1 KiB, modulo 2**64; the sums are mixed
with their position by the finalizer of SplitMix64 (Steele, Lea and Flood 2014) and summed again. One flipped bit always
changes the result; blocks that are exchanged, zeroed or shifted do but for a chance of 2**-64. One thread reads faster
than storage, and does not wait for others on a busy machine.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch

_BLOCK_BYTES = 1024
_SLICE_BLOCKS = 1 << 16  # summed per call: bounds the temporary memory
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = np.dtype("<u8")


def tensor_checksum(tensor: torch.Tensor) -> str:
    """Returns 16 hexadecimal digits that depend on the tensor's bytes and their number.

    Args:
        tensor: of any dtype, shape and device.
    """
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    num_whole = raw.size // _BLOCK_BYTES
    total = _mixed(np.array([raw.size], _WORD), 0)
    for first in range(0, num_whole, _SLICE_BLOCKS):
        last = min(first + _SLICE_BLOCKS, num_whole)
        blocks = raw[first * _BLOCK_BYTES : last * _BLOCK_BYTES].view(_WORD).reshape(last - first, -1)
        total += _mixed(blocks.sum(axis=1), first + 1)
    rest = raw[num_whole * _BLOCK_BYTES :]
    if rest.size:
        tail = np.zeros(_BLOCK_BYTES, np.uint8)
        tail[: rest.size] = rest
        total += _mixed(tail.view(_WORD).sum(keepdims=True), num_whole + 1)
    return f"{total % 2**64:016x}"


def json_checksum(data: Any) -> str:
    """Returns the SHA-256 of what JSON keeps of ``data``, whatever the white space and the order of its keys."""
    kept = json.loads(json.dumps(data))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _mixed(sums: np.ndarray, first: int) -> int:
    """Returns the sum of SplitMix64's finalizer over ``sums + golden * (position + 1)``, from ``first`` on."""
    x = sums + _GOLDEN * np.arange(first + 1, first + 1 + sums.size, dtype=_WORD)
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return int((x ^ (x >> np.uint64(31))).sum())
