"""Random queries over a paged cache, for tests that compare attention kernels with the reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.sparsity import BlockSparsity

FLOAT8 = torch.float8_e4m3fn
SCALE = 0.17


@dataclass
class PagedCase:
    """Sequences of ``lengths`` keys, the last ``queries`` of which have queries; caches are NaN where nothing is.

    Table rows are shuffled; where a window has passed blocks are evicted (-1) unless they hold sinks.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None  # None: dtype
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    page: int = 16
    device: str = "cpu"
    options: dict = field(default_factory=dict)  # keywords of the kernels and the reference
    kv_scales: tuple[float, float] | None = None
    value_dim: int = 0  # of a latent cache: values are the last so many numbers of keys; 0: they have a cache

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(11)
        count, tokens = len(self.lengths), sum(self.queries)
        wide = (self.heads + 2 * self.kv_heads) * self.dim
        fused = torch.randn(tokens, wide, generator=random).to(self.dtype)
        self.q = fused[:, : self.heads * self.dim].unflatten(1, (self.heads, self.dim))  # a view, as in a model
        blocks = [-(-length // self.page) for length in self.lengths]
        ids = torch.randperm(sum(blocks) + 3, generator=random).int()
        self.tables = torch.full((count + 2, max(blocks, default=0) + 1), 2**30, dtype=torch.int32)
        self.rows = torch.randperm(count + 2, generator=random)[:count].int()
        shape = (len(ids), self.kv_heads, self.page, self.dim)
        stored = self.cache or self.dtype
        self.k, self.v = (torch.full(shape, float("nan")).to(stored) for _ in range(2))
        for row, length, first, used in zip(
            self.rows.tolist(), self.lengths, torch.tensor([0, *blocks]).cumsum(0), blocks
        ):
            own = ids[int(first) : int(first) + used]
            self.tables[row, :used] = own
            for i, block in enumerate(own.tolist()):
                filled = min(self.page, length - i * self.page)
                for cache in (self.k, self.v):
                    values = torch.randn(self.kv_heads, filled, self.dim, generator=random)
                    cache.view(_bits(stored))[block, :, :filled] = values.to(stored).view(_bits(stored))
        if self.value_dim:
            self.v = self.k[..., self.dim - self.value_dim :]
        self._evict()
        self.starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        self.context = torch.tensor(self.lengths, dtype=torch.int32)

    def _evict(self) -> None:
        window, sinks = self.options.get("sliding_window", 0), self.options.get("num_sinks", 0)
        for row, length, queries in zip(self.rows.tolist(), self.lengths, self.queries):
            gone = max(0, length - queries + 1 - window) // self.page if window else 0
            if self.options.get("is_chunked"):
                gone = (length - queries) // window * window // self.page
            self.tables[row, -(-sinks // self.page) : gone] = -1

    def expected(self) -> Tensor:
        """The reference's result, [T, Hq, D] float32."""
        scales = self.kv_scales or (1.0, 1.0)
        k, v = (torch.nan_to_num(x.float()) * scale for x, scale in zip((self.k, self.v), scales))
        tables = torch.where(self.tables[self.rows.long()] == 2**30, 0, self.tables[self.rows.long()])
        return reference.paged_attention(self.q.float(), k, v, tables, self.starts, self.context, SCALE, **self.options)

    def slots(self) -> list[int]:
        """Where in the cache each key of each sequence is: block * page + place in it."""
        return [
            int(self.tables[row, i // self.page]) * self.page + i % self.page
            for row, length in zip(self.rows.tolist(), self.lengths)
            for i in range(length)
        ]

    def tensors(self) -> tuple[Tensor, ...]:
        """Queries, caches, tables and rows on the device."""
        return tuple(x.to(self.device) for x in (self.q, self.k, self.v, self.tables, self.rows))

    def keywords(self) -> dict:
        """Options of the kernels, on the device."""
        options = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        if self.kv_scales is not None:
            options["kv_scales"] = torch.tensor(self.kv_scales, device=self.device)
        return {"scale": SCALE, **options}

    def check(self, result: Tensor, tolerance: float | None = None) -> None:
        """Compares with the reference; by default within what the dtype of the products explains."""
        if tolerance is None:
            tolerance = 2e-5 if self.dtype == torch.float32 else 2e-2 if self.dtype == torch.bfloat16 else 4e-3
        torch.testing.assert_close(result.float().cpu(), self.expected(), rtol=tolerance, atol=tolerance)

    def but(self, **changes: object) -> PagedCase:
        """The same with other fields."""
        return replace(self, **changes)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Integers as wide as a dtype: not every operation knows float8."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def every_option(heads: int) -> dict:
    """Window, sinks, softcap, ALiBi and sink logits together."""
    random = torch.Generator().manual_seed(3)
    return {
        "sliding_window": 37, "num_sinks": 3, "softcap": 4.0,
        "alibi_slopes": torch.rand(heads, generator=random) * 0.1,
        "sink_logits": torch.randn(heads, generator=random),
    }  # fmt: skip


OPTIONS = {
    "window": {"sliding_window": 37},
    "window and sinks": {"sliding_window": 37, "num_sinks": 5},
    "short window": {"sliding_window": 1},
    "chunks": {"sliding_window": 24, "is_chunked": True},
    "sparse": {"sparsity": BlockSparsity(8, 2, 3, 1, first_head=4)},
    "sparse, all heads alike": {"sparsity": BlockSparsity(16, 1, 4, 0), "softcap": 3.0},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": every_option(8)["alibi_slopes"]},
    "rounded alibi": {"alibi_slopes": every_option(8)["alibi_slopes"].bfloat16().float(), "rounds_alibi": True},
    "sink logits": {"sink_logits": every_option(8)["sink_logits"]},
    "all": every_option(8),
}
