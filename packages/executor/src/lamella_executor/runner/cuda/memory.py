"""How a device's memory is divided: weights, the work of the largest step, recorded steps, and KV blocks.

The rule: what is free once the weights are there, less the largest step and the recordings, times
``KvCacheConfig.free_gpu_memory_fraction``, is the KV cache; ``max_gpu_total_bytes`` and ``max_tokens`` may make it
smaller. ``gpu_memory_utilization`` bounds all of it together, as a fraction of the device's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamella_core.config import ModelConfig
from lamella_core.errors import OutOfMemoryError
from lamella_executor.config import KvCacheConfig
from lamella_executor.memory import KvCacheDemand, KvCachePlan, costless_blocks

REUSE_FACTOR = 8  # with block reuse the cache also keeps this many times what runs at once, if memory allows
GRAPH_BYTES = 3 << 20  # of one recorded size, beside the tensors: kernel nodes and their arguments
GRAPH_SLACK_BYTES = 96 << 20  # workspaces of matrix products that recordings have of their own
_MIB = 1 << 20


@dataclass(frozen=True)
class DeviceNeeds:
    """What an engine needs of a device beside its KV cache, in bytes."""

    weights: int  # in place already
    workspace: int  # of the largest step
    graphs: int
    state: int  # block tables and buffers
    recurrent: int = 0  # states of the sequences, in models that have them

    @property
    def to_come(self) -> int:
        """What is not in place yet."""
        return self.workspace + self.graphs + self.state + self.recurrent


@dataclass(frozen=True)
class DeviceMemory:
    """A device once the weights are in place, in bytes."""

    total: int
    free: int


@dataclass(frozen=True)
class DeviceMemoryPlan:
    """Where the device's memory goes."""

    kv: KvCachePlan
    needs: DeviceNeeds
    device: DeviceMemory

    def table(self) -> str:
        """Returns the plan for the log, one line per use."""
        rest = self.device.free - self.needs.to_come - self.kv.num_bytes
        rows = {
            "weights": self.needs.weights,
            "largest step": self.needs.workspace,
            "recorded steps": self.needs.graphs,
            "tables and buffers": self.needs.state,
            "recurrent states": self.needs.recurrent,
            f"KV cache, {self.kv.num_blocks} blocks of {self.kv.tokens_per_block} tokens": self.kv.num_bytes,
            "left": rest,
            "others and the driver": self.device.total - self.device.free - self.needs.weights,
            "device": self.device.total,
        }
        width = max(map(len, rows))
        return "\n".join(f"  {name:{width}}  {size / _MIB:10.0f} MiB" for name, size in rows.items())


def plan_device_memory(
    needs: DeviceNeeds,
    device: DeviceMemory,
    config: KvCacheConfig,
    demand: KvCacheDemand,
    *,
    block_bytes: int,
    tokens_per_block: int,
) -> DeviceMemoryPlan:
    """Decides the number of KV blocks; allocates nothing.

    Args:
        needs: beside the cache.
        device: what is there.
        config: the user's limits.
        demand: what the engine's limits can make use of; bounds the size.
        block_bytes: keys and values of one block in all layers.
        tokens_per_block: resolved.

    Raises:
        OutOfMemoryError: not even one sequence's next token would fit; the message has the numbers and the knobs.
    """
    available, bound = device.free, ""
    if config.gpu_memory_utilization is not None:
        budget = int(device.total * config.gpu_memory_utilization) - needs.weights
        if budget < available:
            available = budget
            bound = f"gpu_memory_utilization {config.gpu_memory_utilization:g} of {device.total / _MIB:.0f} MiB, "
    available -= needs.to_come
    room = int(max(available, 0) * config.free_gpu_memory_fraction)
    if config.max_gpu_total_bytes is not None:
        room = min(room, config.max_gpu_total_bytes)
    if block_bytes == 0:
        if available < 0:
            raise OutOfMemoryError(
                f"{bound}{device.free / _MIB:.0f} MiB are free on the device beside {needs.weights / _MIB:.0f} MiB of "
                f"weights; the largest step, recorded steps and tables take "
                f"{(needs.to_come - needs.recurrent) / _MIB:.0f} MiB and the recurrent states of "
                f"{demand.max_sequences} sequences {needs.recurrent / _MIB:.0f}. Lower max_batch_size or "
                "max_num_tokens, or raise gpu_memory_utilization"
            )
        return DeviceMemoryPlan(
            KvCachePlan(costless_blocks(demand, tokens_per_block), tokens_per_block, 0), needs, device
        )
    num_blocks = room // block_bytes - 1  # one is scratch
    if num_blocks < 1:
        tables = needs.state + needs.recurrent
        raise OutOfMemoryError(
            f"no KV block fits on the device: {bound}{device.free / _MIB:.0f} MiB are free beside "
            f"{needs.weights / _MIB:.0f} MiB of weights; the largest step takes {needs.workspace / _MIB:.0f}, recorded "
            f"steps {needs.graphs / _MIB:.0f}, tables and states {tables / _MIB:.0f} MiB, and the cache may use "
            f"{room / _MIB:.1f} MiB of the rest, where two blocks of {tokens_per_block} tokens take "
            f"{2 * block_bytes / _MIB:.1f} MiB. Lower max_num_tokens or max_batch_size, or raise "
            "KvCacheConfig.free_gpu_memory_fraction, max_gpu_total_bytes or gpu_memory_utilization"
        )
    num_blocks = min(num_blocks, _useful_blocks(config, demand, tokens_per_block))
    return DeviceMemoryPlan(KvCachePlan(num_blocks, tokens_per_block, block_bytes), needs, device)


def _useful_blocks(config: KvCacheConfig, demand: KvCacheDemand, tokens_per_block: int) -> int:
    """Returns how many blocks are asked for, or can be used."""
    useful = demand.max_sequences * (-(-demand.max_resident_tokens // tokens_per_block))
    if config.enable_block_reuse:
        useful *= REUSE_FACTOR
    if config.max_tokens is not None:
        useful = min(useful, -(-config.max_tokens // tokens_per_block))
    return useful


def activation_bytes(config: ModelConfig, num_rows: int) -> int:
    """Estimates the memory of the tensors of a step of ``num_rows`` tokens, logits not counted: its widest layer."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = (heads + config.num_attention_heads) * config.head_dim
    widest = max(attention, 3 * config.intermediate_size)  # gate and up beside their product
    return num_rows * config.torch_dtype.itemsize * (4 * config.hidden_size + widest)


def logits_bytes(config: ModelConfig, num_rows: int) -> int:
    """Returns the memory of rows of logits in the model's dtype."""
    return num_rows * config.vocab_size * config.torch_dtype.itemsize


def graph_bytes(config: ModelConfig, sizes: list[int]) -> int:
    """Estimates the memory of decoding steps recorded for these batch sizes; they share all but their results."""
    if not sizes:
        return 0
    results = sum(sizes) * config.hidden_size * config.torch_dtype.itemsize
    shared = max(activation_bytes(config, max(sizes)), logits_bytes(config, max(sizes)))
    return results + shared + len(sizes) * GRAPH_BYTES + GRAPH_SLACK_BYTES
