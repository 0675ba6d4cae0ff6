"""Decoding attention by FlashInfer's XQA kernels: block tables and lengths stay on the device, nothing is planned.

Source: `flashinfer.xqa` (FlashInfer 0.6.13 to 0.7). Its conventions, as this module relies on them:

* the page table [S, W] int32 is read as rows that follow each other without gaps, lengths [S, 1] as unsigned 32-bit;
* scores are ``q.k * q_scale * kv_scale / sqrt(D)`` and the output ``p.v * kv_scale * rcp_out_scale``; the former two
  may be floats or float32 tensors of one value, the last is a float. Unless the cache is quantized, ``kv_scale`` is
  left out;
* a window of w shows the last w keys, the query's own among them;
* the counters start as zeros and every launch leaves them so.
"""

from __future__ import annotations

import importlib
import logging
import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lamella_executor.attention.backend import AttentionStep, LayerCall

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
MOST_HEADS_PER_GROUP = 32
MOST_BLOCKS_IN_Z = 65535  # of a CUDA grid; the float8 kernel launches one per sequence and KV head
CAPABILITIES = (9, 12)  # major compute capabilities that XQA is written for and that are not served better otherwise
COUNTERS = 1 << 20  # one per sequence and KV head
SCRATCH_BYTES = 24 << 20  # partial results of at most a few hundred thread blocks, 16 KiB each at most


@dataclass(frozen=True, slots=True)
class XqaModule:
    """What one compiled module of XQA is compiled for; the arguments of `flashinfer.xqa.get_xqa_module`."""

    q_dtype: torch.dtype
    cache_dtype: torch.dtype
    page_size: int
    head_dim: int
    group: int  # Hq / Hkv
    has_window: bool
    out_dtype: torch.dtype


class HostScales:
    """Values of scale tensors on the host; each tensor is read once, which waits for the device."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the tensors belong to the model's layers

    def get(self, scales: Tensor, may_wait: bool) -> list[float] | None:
        """Returns the values; None if they are not known yet and it may not wait for the device."""
        found: list[float] | None = self._known.get(scales)
        if found is None and may_wait:
            found = scales.detach().float().flatten().tolist()
            self._known[scales] = found
        return found


class XqaDecode:
    """Decoding attention of one engine; owns the kernels' workspace. See the module for the conventions."""

    def __init__(self, device: torch.device, capability: tuple[int, int], scales: HostScales) -> None:
        self._library: ModuleType = importlib.import_module("flashinfer.xqa")
        self._capability = capability
        self._scales = scales
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device=device)
        self._failures: dict[XqaModule, str | None] = {}  # None: compiled and loaded

    @property
    def workspace_bytes(self) -> int:
        return self._counters.nbytes + self._scratch.nbytes

    def why_not(self, q: Tensor, layer: LayerCall) -> str | None:
        """Returns why a layer is not served, by what does not change from step to step; None if it is."""
        spec, window, cache = layer.spec, layer.window, layer.k_cache
        checks = (
            (self._capability[0] in CAPABILITIES, f"compute capability {self._capability}"),
            (q.dtype in HALVES, f"queries of {q.dtype}"),
            (cache.dtype in (q.dtype, torch.float8_e4m3fn), f"a cache of {cache.dtype}"),
            (cache.shape[2] in PAGE_SIZES, f"blocks of {cache.shape[2]} tokens"),
            (not spec.is_latent, "a latent cache"),
            (spec.sparsity is None, "block-sparse attention"),
            (spec.head_dim in HEAD_DIMS, f"head_dim {spec.head_dim}"),
            (spec.num_heads <= MOST_HEADS_PER_GROUP * spec.num_kv_heads, "more than 32 heads per KV head"),
            (not window.is_chunked, "attention in chunks"),
            (not spec.softcap, "soft-capped scores"),
            (layer.alibi_slopes is None, "ALiBi"),
            (layer.sink_logits is None, "sink logits"),
            (not (window.length and window.num_sinks), "sink tokens beside a window"),
        )
        return next((reason for is_served, reason in checks if not is_served), None)

    def serves(self, step: AttentionStep, q: Tensor, layer: LayerCall, out_dtype: torch.dtype) -> bool:
        """Whether this call can be made now: the batch is small enough and the module is there, or can be compiled.

        A module is neither compiled nor loaded while a graph is captured: loading it reads from the device.
        """
        rows = q.shape[0] * layer.spec.num_kv_heads
        if rows > min(MOST_BLOCKS_IN_Z, COUNTERS):
            return False
        wanted = _module(q, layer, out_dtype)
        if wanted not in self._failures:
            if step.is_captured:
                logger.warning("FlashInfer's %s is not loaded at capture: another backend is captured", wanted)
                return False
            self._failures[wanted] = self._load(wanted)
        return self._failures[wanted] is None

    def out_dtype(self, step: AttentionStep, q: Tensor, layer: LayerCall) -> torch.dtype:
        """Returns the dtype that `run` can return: float8 if that is asked for, the cache is, and the scale known."""
        if layer.out_scale is None or layer.k_cache.dtype != torch.float8_e4m3fn:
            return q.dtype
        known = self._scales.get(layer.out_scale, may_wait=not step.is_captured)
        return q.dtype if known is None else torch.float8_e4m3fn

    def run(self, step: AttentionStep, tables: Tensor, q: Tensor, layer: LayerCall, out_dtype: torch.dtype) -> Tensor:
        """Returns [D_, Hq, D] in ``out_dtype`` for q [D_, Hq, D]; tables [D_, W] int32 without gaps, see `serves`."""
        out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
        q_scale, kv_scale = self._factors(step, layer)
        rcp_out_scale = 1.0
        if out_dtype == torch.float8_e4m3fn and layer.out_scale is not None:
            known = self._scales.get(layer.out_scale, may_wait=not step.is_captured)
            rcp_out_scale = 1.0 if known is None else 1.0 / known[0]
        self._library.xqa(
            q.contiguous().unsqueeze(1),
            layer.k_cache,
            layer.v_cache,
            tables,
            step.context_lens[: q.shape[0]].unsqueeze(1),
            out.unsqueeze(1),
            self._scratch,
            self._counters,
            layer.spec.num_kv_heads,
            layer.k_cache.shape[2],
            q_scale=q_scale,
            kv_scale=kv_scale,
            sliding_win_size=layer.window.length,
            kv_layout="HND",
            rcp_out_scale=rcp_out_scale,
        )
        return out

    def _factors(self, step: AttentionStep, layer: LayerCall) -> tuple[float | Tensor, float | Tensor]:
        """Returns q_scale and kv_scale such that scores are scaled by spec.scale * k_scale, values by v_scale."""
        plain = layer.spec.scale * math.sqrt(layer.spec.head_dim)
        if layer.kv_scales is None:
            return plain, 1.0
        known = self._scales.get(layer.kv_scales, may_wait=not step.is_captured)
        if known is not None:
            return plain * known[0] / known[1], known[1]
        key_scale, value_scale = layer.kv_scales.float().split(1)
        return key_scale * (plain / value_scale), value_scale

    def _load(self, wanted: XqaModule) -> str | None:
        """Compiles and loads a module; returns why it cannot be had, or None."""
        logger.info("loading FlashInfer's XQA kernels for %s (the first time, they are compiled)", wanted)
        try:
            self._library.get_xqa_module(
                wanted.q_dtype, wanted.cache_dtype, wanted.page_size, wanted.head_dim, wanted.group,
                wanted.has_window, wanted.out_dtype, 1,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - compilers and loaders fail in many ways; another backend serves
            reason = f"{type(error).__name__}: {_end(str(error))}"
            logger.warning("FlashInfer's XQA kernels for %s cannot be used, another backend is: %s", wanted, reason)
            return reason
        return None


def _module(q: Tensor, layer: LayerCall, out_dtype: torch.dtype) -> XqaModule:
    spec, cache = layer.spec, layer.k_cache
    group = spec.num_heads // spec.num_kv_heads
    return XqaModule(q.dtype, cache.dtype, cache.shape[2], spec.head_dim, group, layer.window.length > 0, out_dtype)


def _end(text: str, most: int = 1500) -> str:
    """The end of a compiler's output, where its errors are."""
    return text if len(text) <= most else "... " + text[-most:]
