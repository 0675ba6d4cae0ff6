"""BlockSparsity: which blocks of keys a head's queries see where attention is sparse (Abdin et al. 2024, "Phi-3")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSparsity:
    """Causal attention that sees the nearest blocks of positions, and of the others every ``vert_stride``-th.

    Positions are cut into blocks of ``block_size``. A query in block i sees a key in block j <= i if
    i - j < ``num_local_blocks``, or if (j + ``head_step`` * h + 1) is a multiple of ``vert_stride`` for its head h.
    Heads are counted over all ranks, from ``first_head`` on.
    """

    block_size: int  # tokens
    num_local_blocks: int
    vert_stride: int  # blocks
    head_step: int  # blocks by which the pattern moves from head to head; 0: all heads see the same
    first_head: int = 0  # number of this rank's first query head

    def offsets(self, num_heads: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns by how many blocks the pattern of each head is moved: [num_heads] int64."""
        return (torch.arange(num_heads, device=device) + self.first_head) * self.head_step

    def seen(self, positions: Tensor, keys: Tensor, num_heads: int) -> Tensor:
        """Returns which ``keys`` [K] queries at ``positions`` [Q] see beside being causal: [num_heads, Q, K] bool."""
        blocks = keys // self.block_size
        is_near = positions[:, None] // self.block_size - blocks[None, :] < self.num_local_blocks
        is_column = (blocks[None, :] + self.offsets(num_heads, keys.device)[:, None] + 1) % self.vert_stride == 0
        return is_near[None] | is_column[:, None]
