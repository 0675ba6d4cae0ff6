"""The paged KV cache's bookkeeping: block pool, prefix index and the manager above them. No tensors here."""

from lamella_executor.kv_cache.block_pool import BlockPool
from lamella_executor.kv_cache.manager import KvCacheManager, KvCacheStats, PrefixMatch
from lamella_executor.kv_cache.prefix import PrefixIndex

__all__ = ["BlockPool", "KvCacheManager", "KvCacheStats", "PrefixIndex", "PrefixMatch"]
