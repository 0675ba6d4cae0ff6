"""Random numbers that depend on nothing but (seed, sequence index, position).

Philox4x64-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2,
3" (SC 2011): ten rounds of multiply-and-xor turn a 256-bit counter and a 128-bit key into four 64-bit words. There is
no state to save, so a draw is the same whatever the batch, the chunking, and after pause and resume.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # added to the key before each further round
_ROUNDS = 10


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the four 64-bit words of one Philox4x64-10 block."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> 64) ^ c1 ^ k0, right & _MASK, (left >> 64) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int, position: int) -> float:
    """Returns a number in [0, 1) with 53 random bits.

    Args:
        seed: any integer; taken modulo 2**128.
        index: which sample of the request.
        position: how many tokens that sample has generated so far.
    """
    word = philox4x64((position, index, 0, 0), (seed & _MASK, (seed >> 64) & _MASK))[0]
    return (word >> 11) * 2.0**-53
