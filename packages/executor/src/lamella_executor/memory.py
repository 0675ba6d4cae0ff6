"""How large the KV cache of a CPU becomes, and how much memory this machine has left for it.

The default is what ``max_batch_size`` sequences of ``max_seq_len`` tokens need, but no more than
`DEFAULT_FRACTION` of the memory that is free once the weights are mapped. ``max_tokens`` and ``host_memory_bytes`` of
`KvCacheConfig` replace the default (the smaller wins); they may claim up to `EXPLICIT_FRACTION`.
`lamella_executor.runner.cuda.memory` does the same for a GPU, where ``free_gpu_memory_fraction``,
``max_gpu_total_bytes`` and ``gpu_memory_utilization`` count, which have no effect here.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from lamella_core.context import AttentionSpec
from lamella_core.errors import OutOfMemoryError
from lamella_core.host_memory import available_bytes
from lamella_executor.config import KvCacheConfig

DEFAULT_FRACTION = 0.5
EXPLICIT_FRACTION = 0.95  # the rest is for activations and the process itself
_MIB = 1 << 20


@dataclass(frozen=True)
class KvCachePlan:
    """The size of the KV cache; memory is reserved, and provided by the machine as blocks are used."""

    num_blocks: int
    tokens_per_block: int
    block_bytes: int  # keys and values of all layers of this rank

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.tokens_per_block

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True)
class KvCacheDemand:
    """What the engine's limits can make use of at most."""

    max_sequences: int  # computed side by side, beams included
    max_resident_tokens: int  # that one sequence keeps: max_seq_len, or less behind a sliding window


def plan_kv_cache(
    specs: SequenceOf[AttentionSpec],
    dtype: torch.dtype,
    tokens_per_block: int,
    config: KvCacheConfig,
    demand: KvCacheDemand,
    free_bytes: int | None = None,
    state_bytes: int = 0,
) -> KvCachePlan:
    """Decides the number of KV blocks; allocates nothing.

    Args:
        specs: this rank's attention layers.
        dtype: of keys and values.
        tokens_per_block: resolved.
        config: the user's limits.
        demand: bounds the default size.
        free_bytes: memory to plan with; None asks the machine.
        state_bytes: of it, what recurrent states take.

    Raises:
        OutOfMemoryError: what was asked for exceeds the free memory, or not even one block fits.
    """
    free = available_bytes() if free_bytes is None else free_bytes
    if state_bytes > free * EXPLICIT_FRACTION:
        raise OutOfMemoryError(
            f"the recurrent states of {demand.max_sequences} sequences take {state_bytes / _MIB:.0f} MiB, "
            f"{free / _MIB:.0f} MiB are free; lower max_batch_size or max_beam_width"
        )
    free -= state_bytes
    size = block_bytes(specs, dtype, tokens_per_block)
    if size == 0:
        return KvCachePlan(costless_blocks(demand, tokens_per_block), tokens_per_block, 0)
    asked = _asked_blocks(config, tokens_per_block, size)
    if asked:
        knob = min(asked, key=lambda name: asked[name])
        num_blocks, source = asked[knob], f"KvCacheConfig.{knob} is {getattr(config, knob)}"
        most = int(free * EXPLICIT_FRACTION) // size
        if num_blocks > most:
            raise OutOfMemoryError(
                f"{source}, which takes {num_blocks * size / _MIB:.0f} MiB of KV cache; {free / _MIB:.0f} MiB "
                f"are free and {EXPLICIT_FRACTION:.0%} of them may be used. At most {most * tokens_per_block} tokens "
                f"fit: lower {knob}"
            )
    else:
        per_sequence = -(-demand.max_resident_tokens // tokens_per_block)
        num_blocks = min(demand.max_sequences * per_sequence, int(free * DEFAULT_FRACTION) // size)
        source = f"{DEFAULT_FRACTION:.0%} of {free / _MIB:.0f} MiB free memory"
    if num_blocks < 1:
        raise OutOfMemoryError(
            f"{source}, less than one KV block: {tokens_per_block} tokens take {size} bytes. Raise "
            "KvCacheConfig.host_memory_bytes, free memory, or lower tokens_per_block"
        )
    return KvCachePlan(num_blocks, tokens_per_block, size)


def costless_blocks(demand: KvCacheDemand, tokens_per_block: int) -> int:
    """Returns how many blocks there are where no layer attends: as many as can be in use, for they hold nothing."""
    return demand.max_sequences * (-(-demand.max_resident_tokens // tokens_per_block))


def block_bytes(specs: SequenceOf[AttentionSpec], dtype: torch.dtype, tokens_per_block: int) -> int:
    """Returns the bytes of one block: keys and values of all of this rank's layers."""
    return tokens_per_block * sum(spec.cache_width for spec in specs) * dtype.itemsize


def _asked_blocks(config: KvCacheConfig, tokens_per_block: int, block_bytes: int) -> dict[str, int]:
    """Returns the blocks that each size limit the user set amounts to, by its name."""
    asked: dict[str, int] = {}
    if config.max_tokens is not None:
        asked["max_tokens"] = -(-config.max_tokens // tokens_per_block)
    if config.host_memory_bytes is not None:
        asked["host_memory_bytes"] = config.host_memory_bytes // block_bytes
    return asked
