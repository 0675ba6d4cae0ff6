"""A package ``flashinfer`` that computes on a CPU what FlashInfer documents, and notes what it was asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass
class FakeFlashInfer:
    """What was asked of the package."""

    loaded: list[tuple[Any, ...]] = field(default_factory=list)  # arguments of get_xqa_module
    decoded: list[dict[str, Any]] = field(default_factory=list)
    planned: list[dict[str, Any]] = field(default_factory=list)
    wrappers: list[Any] = field(default_factory=list)
    failure: Exception | None = None  # raised by whatever would compile

    def get_xqa_module(self, *args: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.loaded.append(args)

    def xqa(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        output: Tensor,
        workspace_buffer: Tensor,
        semaphores: Tensor,
        num_kv_heads: int,
        page_size: int,
        sinks: Tensor | None = None,
        q_scale: float | Tensor = 1.0,
        kv_scale: float | Tensor = 1.0,
        sliding_win_size: int = 0,
        kv_layout: str = "NHD",
        sm_count: int | None = None,
        enable_pdl: bool | None = None,
        rcp_out_scale: float = 1.0,
    ) -> None:
        self.decoded.append({"q_scale": q_scale, "kv_scale": kv_scale, "out": output.dtype, "pages": page_table})
        assert q.is_contiguous() and output.is_contiguous() and page_table.is_contiguous(), "read by address"
        assert page_table.dtype == seq_lens.dtype == torch.int32 and kv_layout == "HND"
        assert not semaphores.any() and workspace_buffer.dtype == torch.uint8
        assert q.dim() == output.dim() == 4 and seq_lens.shape == (q.shape[0], 1)
        head_dim, is_quantized = q.shape[-1], k_cache.dtype.itemsize == 1
        scale = float(q_scale) * (float(kv_scale) if is_quantized else 1.0) / head_dim**0.5
        after = (float(kv_scale) if is_quantized else 1.0) * rcp_out_scale
        for row, length in enumerate(seq_lens.flatten().tolist()):
            pages = page_table[row, : -(-length // page_size)]
            first = max(0, length - sliding_win_size) if sliding_win_size else 0
            keys, values = (rows(cache, pages, length)[first:] for cache in (k_cache, v_cache))
            output[row] = (attend(q[row], keys, values, scale) * after).to(output.dtype)


class FakeWrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`."""

    def __init__(self, owner: FakeFlashInfer, workspace: Tensor, kv_layout: str, *, backend: str) -> None:
        assert kv_layout == "HND" and backend in ("fa2", "fa3")
        self._owner, self._plan = owner, {}
        owner.wrappers.append(self)

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, indices: Tensor, last: Tensor, heads: int, kv_heads: int,
        head_dim: int, page_size: int, **options: Any,
    ) -> None:  # fmt: skip
        if self._owner.failure is not None:
            raise self._owner.failure
        assert {t.dtype for t in (qo_indptr, kv_indptr, indices, last)} == {torch.int32}
        assert indices.numel() == int(kv_indptr[-1]) and bool((indices >= 0).all()) and options.pop("causal")
        assert options["max_token_per_sequence"] == int((qo_indptr[1:] - qo_indptr[:-1]).max())
        lengths = (kv_indptr[1:] - kv_indptr[:-1] - 1) * page_size + last
        self._plan = {"page_size": page_size, "heads": (heads, kv_heads, head_dim), **options}
        self._pieces = [t.tolist() for t in (qo_indptr, kv_indptr, lengths)]
        self._indices = indices
        self._owner.planned.append(self._plan)

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor], *, k_scale: float, v_scale: float, out: Tensor) -> Tensor:
        plan = self._plan
        assert q.dtype == plan["q_data_type"] == plan["o_data_type"] == out.dtype
        assert caches[0].dtype == plan["kv_data_type"]
        starts, page_starts, lengths = self._pieces
        for i, length in enumerate(lengths):
            pages = self._indices[page_starts[i] : page_starts[i + 1]]
            keys, values = (rows(cache, pages, length) for cache in caches)
            for place in range(starts[i], starts[i + 1]):
                end = length - (starts[i + 1] - 1 - place)
                first = max(0, end - 1 - plan["window_left"]) if plan["window_left"] >= 0 else 0
                mixed = attend(q[place][None], keys[first:end], values[first:end], plan["sm_scale"] * k_scale)
                out[place] = (mixed[0] * v_scale).to(out.dtype)
        return out


def rows(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """[length, Hkv, D] float32."""
    return cache.float()[pages.long()].transpose(1, 2).flatten(0, 1)[:length]


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[1, Hq, D] float32 for one query [1, Hq, D] over keys and values [L, Hkv, D]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    weights = torch.softmax(torch.einsum("nhd,lhd->nhl", q.float(), keys) * scale, dim=-1)
    return torch.einsum("nhl,lhd->nhd", weights, values)


def install(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    """Puts the package in place of the real one until the test ends."""
    fake = FakeFlashInfer()
    package, xqa, prefill = (ModuleType(name) for name in ("flashinfer", "flashinfer.xqa", "flashinfer.prefill"))
    package.__version__ = "0.0"
    package.__path__ = []
    xqa.xqa, xqa.get_xqa_module = fake.xqa, fake.get_xqa_module
    prefill.BatchPrefillWithPagedKVCacheWrapper = lambda *args, **options: FakeWrapper(fake, *args, **options)
    for module in (package, xqa, prefill):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake
