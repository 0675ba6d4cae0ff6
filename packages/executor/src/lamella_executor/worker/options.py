"""RankOptions: what every rank of an engine assembles its cache and runner from; the same on all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from lamella_executor.config import KvCacheConfig


@dataclass(frozen=True)
class RankOptions:
    """Options of `GenerationExecutor.create` that concern more than rank 0, and where the ranks are.

    Attributes:
        kv_config: size and behaviour of the KV cache.
        max_batch_size: lowers the engine's own limit.
        max_num_tokens: lowers the engine's own limit.
        attn_backend: on a GPU.
        hosts: rank -> the address at which the other ranks reach it; empty: there is one rank.
        stall_timeout_s: after which a rank that waits for another in vain gives up.
    """

    kv_config: KvCacheConfig
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    attn_backend: str = "auto"
    hosts: tuple[str, ...] = ()
    stall_timeout_s: float = 300.0

    def encode(self) -> bytes:
        """Returns them as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> RankOptions:
        """Inverse of `encode`."""
        return msgspec.json.decode(data, type=cls)

    def ranks_beside(self, rank: int) -> int:
        """Returns how many ranks run on a rank's machine, itself included."""
        return self.hosts.count(self.hosts[rank]) if self.hosts else 1

    def own_kv_config(self, rank: int) -> KvCacheConfig:
        """Returns the configuration of one rank's cache: what is said of a machine's memory, its ranks share."""
        budget = self.kv_config.host_memory_bytes
        if budget is None:
            return self.kv_config
        return replace(self.kv_config, host_memory_bytes=max(1, budget // self.ranks_beside(rank)))
