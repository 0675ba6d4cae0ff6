"""Prompt attention by FlashInfer's FlashAttention kernels over paged KV: planned on the host once per step.

Source: `flashinfer.BatchPrefillWithPagedKVCacheWrapper` (FlashInfer 0.6.13 to 0.7). "fa3" is written for Hopper and
takes keys of the queries' dtype; "fa2" runs from compute capability 8.0 and also takes float8 keys.
"""

from __future__ import annotations

import importlib
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella_executor.attention.backend import AttentionStep, HostLengths, LayerCall
from lamella_executor.attention.flashinfer_decode import HALVES, HostScales

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
KERNELS = ("auto", "fa2", "fa3")
WORKSPACE_BYTES = 128 << 20  # partial results of split keys; FlashInfer's own advice
PLANS_IN_FLIGHT = 2  # a plan's pinned memory is not written again before the device has read it


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What layers must share to share a plan."""

    kernel: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    window: int  # 0: none
    q_dtype: torch.dtype
    cache_dtype: torch.dtype


@dataclass
class _Planner:
    """A FlashInfer wrapper, and when the device had read its last plan."""

    wrapper: Any
    read: torch.cuda.Event | None = None


@dataclass
class StepPlans:
    """What the layers of one step share."""

    planned: dict[PlanKey, _Planner | None] = field(default_factory=dict)  # None: planning failed
    pages: Tensor | None = None  # [pages of all prompts] int32


class PagedPrefill:
    """Prompt attention of one engine; owns the kernels' workspaces.

    Args:
        kernel: "fa2", "fa3", or "auto": fa3 where it can serve.
    """

    def __init__(self, device: torch.device, capability: tuple[int, int], scales: HostScales, kernel: str) -> None:
        self._wrapper_type: Any = importlib.import_module("flashinfer.prefill").BatchPrefillWithPagedKVCacheWrapper
        self._device = device
        self._capability = capability
        self._scales = scales
        self._kernel = kernel
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._rings: dict[PlanKey, list[_Planner]] = defaultdict(list)  # oldest first
        self._failed: set[PlanKey] = set()

    @property
    def workspace_bytes(self) -> int:
        return self._workspace.nbytes

    def kernel_for(self, q_dtype: torch.dtype, cache_dtype: torch.dtype) -> str:
        """Returns "fa2" or "fa3"."""
        if self._kernel != "auto":
            return self._kernel
        return "fa3" if self._capability[0] == 9 and cache_dtype == q_dtype else "fa2"

    def why_not(self, q: Tensor, layer: LayerCall) -> str | None:
        """Returns why a layer is not served, by what does not change from step to step; None if it is."""
        spec, cache = layer.spec, layer.k_cache
        kernel = self.kernel_for(q.dtype, cache.dtype)
        checks = (
            (kernel != "fa3" or self._capability[0] == 9, f"compute capability {self._capability} with fa3"),
            (q.dtype in HALVES, f"queries of {q.dtype}"),
            (cache.dtype in (q.dtype, torch.float8_e4m3fn), f"a cache of {cache.dtype}"),
            (kernel != "fa3" or cache.dtype == q.dtype, f"a cache of {cache.dtype} with fa3"),
            (not spec.is_latent, "a latent cache"),
            (spec.sparsity is None, "block-sparse attention"),
            (spec.head_dim in HEAD_DIMS, f"head_dim {spec.head_dim}"),
            (not layer.window.is_chunked, "attention in chunks"),
            (not spec.softcap, "soft-capped scores"),
            (layer.alibi_slopes is None, "ALiBi"),
            (layer.sink_logits is None, "sink logits"),
            (not (layer.window.length and layer.window.num_sinks), "sink tokens beside a window"),
        )
        return next((reason for is_served, reason in checks if not is_served), None)

    def run(
        self, step: AttentionStep, plans: StepPlans, q: Tensor, layer: LayerCall, out: Tensor | None = None
    ) -> Tensor | None:
        """Returns [T - D_, Hq, D] in q's dtype, for q of that shape; None if FlashInfer cannot compute it after all.

        The result is in ``out``, if that is given and has this dtype.
        """
        if step.host is None:
            return None  # a plan is of one step's lengths: it cannot be replayed
        key = self._key(q, layer)
        if key not in plans.planned:
            plans.planned[key] = self._plan(step, step.host, plans, key)
        planner = plans.planned[key]
        if planner is None:
            return None
        scales = None if layer.kv_scales is None else self._scales.get(layer.kv_scales, may_wait=True)
        k_scale, v_scale = scales or (1.0, 1.0)
        if out is None or out.dtype != q.dtype or not out.is_contiguous():
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        result: Tensor = planner.wrapper.run(
            q,
            (layer.k_cache, layer.v_cache),
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )
        return result

    def _key(self, q: Tensor, layer: LayerCall) -> PlanKey:
        spec, cache = layer.spec, layer.k_cache
        return PlanKey(
            self.kernel_for(q.dtype, cache.dtype), spec.num_heads, spec.num_kv_heads, spec.head_dim, cache.shape[2],
            spec.scale, layer.window.length, q.dtype, cache.dtype,
        )  # fmt: skip

    def _plan(self, step: AttentionStep, host: HostLengths, plans: StepPlans, key: PlanKey) -> _Planner | None:
        """Plans a step's prompts; None, and a warning, if the kernels cannot be compiled or planned for."""
        if key in self._failed:
            return None
        try:
            planner = self._next_planner(key)
            if plans.pages is None:
                plans.pages = self._pages(step, host, key.page_size)
            self._give(planner.wrapper, host, step.num_decode, plans.pages, key)
        except Exception as error:  # noqa: BLE001 - compilers and loaders fail in many ways; another backend serves
            self._failed.add(key)
            logger.warning(
                "FlashInfer's %s prompt attention cannot be used for %s, another backend is: %s: %s",
                key.kernel, key, type(error).__name__, str(error)[-1500:],
            )  # fmt: skip
            return None
        if self._device.type == "cuda":
            planner.read = torch.cuda.Event()
            planner.read.record()
        self._rings[key].append(planner)
        return planner

    def _next_planner(self, key: PlanKey) -> _Planner:
        """Returns a wrapper whose pinned memory may be written; waits if the device has not read all of them yet."""
        ring = self._rings[key]
        if len(ring) < PLANS_IN_FLIGHT:
            if not ring:
                logger.info("loading FlashInfer's prompt attention for %s (the first time, it is compiled)", key)
            return _Planner(self._wrapper_type(self._workspace, "HND", backend=key.kernel))
        planner = ring.pop(0)
        if planner.read is not None:
            planner.read.synchronize()
        return planner

    def _pages(self, step: AttentionStep, host: HostLengths, page_size: int) -> Tensor:
        """Returns the blocks of every prompt's keys, one prompt after another, [pages] int32 on the device."""
        counts = _page_counts(host.context[step.num_decode :], page_size)
        width = int(counts.max())
        rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        columns = np.arange(len(rows), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
        places = torch.from_numpy(rows * width + columns)
        if self._device.type == "cuda":
            places = places.pin_memory()
        tables = step.block_tables[:, :width].index_select(0, step.table_rows[step.num_decode :])
        # blocks behind a window are gone from the table; the kernels may load what they mask
        return tables.flatten().index_select(0, places.to(self._device, non_blocking=True)).clamp_(min=0)

    def _give(self, wrapper: Any, host: HostLengths, num_decode: int, pages: Tensor, key: PlanKey) -> None:
        """Hands the lengths of this step's prompts to a wrapper, as host tensors: it reads them on the host."""
        context, query = host.context[num_decode:], host.query[num_decode:]
        counts = _page_counts(context, key.page_size)
        wrapper.plan(
            _starts(query),
            _starts(counts),
            pages,
            torch.from_numpy((context - (counts - 1) * key.page_size).astype(np.int32)),
            key.num_heads,
            key.num_kv_heads,
            key.head_dim,
            key.page_size,
            causal=True,
            sm_scale=key.scale,
            window_left=key.window - 1 if key.window else -1,
            q_data_type=key.q_dtype,
            kv_data_type=key.cache_dtype,
            o_data_type=key.q_dtype,
            max_token_per_sequence=int(query.max()),
        )


def _page_counts(context: np.ndarray, page_size: int) -> np.ndarray:
    counts: np.ndarray = -(-context // page_size)
    return counts


def _starts(lengths: np.ndarray) -> Tensor:
    """[n + 1] int32: where each of the packed pieces begins, and the end."""
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    return torch.from_numpy(starts)
