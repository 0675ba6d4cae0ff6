"""Checksums of tensors at memory speed: they find damage (lost, moved or flipped bytes), not tampering.

The bytes are read as little-endian 64-bit words and summed in blocks of 512 bytes, modulo 2**64; the sums are mixed
with their position by the finalizer of SplitMix64 (Steele, Lea and Flood 2014) and summed again. One flipped bit always
changes the result; blocks that are exchanged, zeroed or shifted do but for a chance of 2**-64.
"""

from __future__ import annotations

import torch

_BLOCK_WORDS = 64
_SLICE_BLOCKS = 1 << 18  # blocks (of 512 bytes) summed per call: bounds the temporary memory
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def tensor_checksum(tensor: torch.Tensor) -> str:
    """Returns 16 hexadecimal digits that depend on the tensor's bytes and their number.

    Args:
        tensor: contiguous, on the CPU; any dtype and shape.
    """
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = raw.numel() // (8 * _BLOCK_WORDS) * (8 * _BLOCK_WORDS)
    total = _mixed(torch.tensor([raw.numel()]), -1)
    if whole:
        words = _as_words(raw[:whole]).view(-1, _BLOCK_WORDS)
        for first in range(0, words.shape[0], _SLICE_BLOCKS):
            total += _mixed(words[first : first + _SLICE_BLOCKS].sum(1), first)
    if whole < raw.numel():
        tail = torch.zeros(8 * _BLOCK_WORDS, dtype=torch.uint8)
        tail[: raw.numel() - whole] = raw[whole:]
        total += _mixed(_as_words(tail), whole // (8 * _BLOCK_WORDS))
    return f"{total & (2**64 - 1):016x}"


def _as_words(raw: torch.Tensor) -> torch.Tensor:
    """Views bytes as int64; a misaligned start is copied."""
    return (raw if raw.storage_offset() % 8 == 0 and raw.data_ptr() % 8 == 0 else raw.clone()).view(torch.int64)


def _mixed(sums: torch.Tensor, first: int) -> int:
    """Returns the sum of SplitMix64(value + golden * (position + 2)); int64 arithmetic wraps modulo 2**64."""
    position = torch.arange(first + 2, first + 2 + sums.numel(), dtype=torch.int64)
    x = sums + position * _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX_2)
    return int((x ^ _shifted(x, 31)).sum())


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right (torch's shift of int64 copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
