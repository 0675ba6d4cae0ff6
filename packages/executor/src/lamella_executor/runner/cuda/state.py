"""What a runner keeps on the device between steps, all of it at fixed addresses, as captured steps need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lamella_executor.runner.cuda.slots import RECORD_INTS
from lamella_executor.runner.cuda.transfer import ALIGNMENT, Inbox, Outbox


@dataclass(frozen=True)
class RunnerLimits:
    """The largest step."""

    max_sequences: int  # of one step
    max_num_tokens: int  # rows of one step
    max_seq_len: int  # tokens of one sequence

    @property
    def num_slots(self) -> int:
        """Slots beside scratch: half as many again as one step needs, so that they are given away seldom."""
        return self.max_sequences + max(8, self.max_sequences // 2)

    def max_blocks(self, tokens_per_block: int) -> int:
        """Columns of the block tables; one to spare for blocks that were allocated ahead."""
        return -(-self.max_seq_len // tokens_per_block) + 1


class SlotParameters(NamedTuple):
    """Sampling parameters by slot; device tensors [slots + 1], the last slot is scratch and greedy."""

    temperature: Tensor  # float64, as the host's sampler computes; 0: greedy
    top_k: Tensor  # int32, 0: all
    top_p: Tensor  # float64, 1: all
    min_p: Tensor  # float64, 0: all
    seed_low: Tensor  # int64, the seed's lower 64 bits
    seed_high: Tensor  # int64


class DeviceState:
    """Block tables, sampling parameters, and the buffers that steps are read from and written to.

    Args:
        limits: the largest step.
        tokens_per_block: tokens a KV block holds.
        scratch_block: what the rows that pad a step write to.
        device: "cuda", or "cpu" in tests.
    """

    def __init__(self, limits: RunnerLimits, tokens_per_block: int, scratch_block: int, device: torch.device) -> None:
        self.tokens_per_block = tokens_per_block
        rows, slots = max(limits.max_num_tokens, limits.max_sequences), limits.num_slots + 1
        max_blocks = limits.max_blocks(tokens_per_block)
        self.block_tables = torch.full((slots, max_blocks), scratch_block, dtype=torch.int32, device=device)
        self.parameters = SlotParameters(
            temperature=torch.zeros(slots, dtype=torch.float64, device=device),
            top_k=torch.zeros(slots, dtype=torch.int32, device=device),
            top_p=torch.ones(slots, dtype=torch.float64, device=device),
            min_p=torch.zeros(slots, dtype=torch.float64, device=device),
            seed_low=torch.zeros(slots, dtype=torch.int64, device=device),
            seed_high=torch.zeros(slots, dtype=torch.int64, device=device),
        )
        self.input_ids, self.positions, self.kv_slots = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.inbox = Inbox(_inbox_ints(limits, tokens_per_block), device)
        self.outbox = Outbox(limits.max_sequences, device)


def _inbox_ints(limits: RunnerLimits, tokens_per_block: int) -> int:
    """Room for the largest step and for the updates of a usual one; `CudaRunner` sends more of them separately."""
    rows, sequences = max(limits.max_num_tokens, limits.max_sequences), limits.max_sequences
    # Tokens, slots, positions, logit rows, prefixes twice; lengths, what is sampled, states, prefixes.
    step = 6 * rows + 10 * sequences
    updates = (RECORD_INTS + 4) * sequences + 4 * (rows // tokens_per_block + 1)
    return step + updates + 32 * ALIGNMENT
