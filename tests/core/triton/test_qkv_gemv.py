"""Rotation and the cache write in the kernel of the product, against the separate kernels: the same bits everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lamella_core.context import KvPlace
from lamella_core.kernels.fused import RopeCacheAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv
from lamella_core.kernels.triton.rope_cache import rope_and_cache
from lamella_core.layers.rotary import Rotation

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
BLOCK, BLOCKS = 4, 3
VECTORS, MATRICES = gemv.VectorTile(8, 1), gemv.MatrixTile(16, 32, 2, 2)


class Case:
    """One product of random numbers and where its heads go."""

    def __init__(
        self,
        device: str,
        *,
        rows: int = 2,
        dtype: torch.dtype = BF16,
        cache: torch.dtype | None = None,
        heads: tuple[int, int] = (2, 1),
        dim: int = 16,
        rotary: int | None = None,
        interleaved: bool = False,
        has_bias: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(rows + dim)
        self.device, self.heads, self.dim = device, heads, dim
        self.dtype = BF16 if dtype == FP8 else dtype
        n = (heads[0] + 2 * heads[1]) * dim
        self.x, self.w = (torch.randn(size, 80, generator=generator).to(dtype).to(device) for size in (rows, n))
        self.bias = torch.randn(n, generator=generator).to(self.dtype).to(device) if has_bias else None
        x_scale, w_scale = torch.tensor(0.5, device=device), torch.tensor(0.25, device=device)
        self.scales = Scales(x_scale, w_scale, self.dtype) if dtype == FP8 else None
        self.slots = torch.randperm(BLOCK * BLOCKS, generator=generator)[:rows].to(device)
        self.cache_dtype = cache or self.dtype
        self.kv_scales: torch.Tensor | None = None
        rotary = dim if rotary is None else rotary
        angles = torch.rand(rows, rotary // 2, generator=generator) * 300
        tables = angles.cos().to(device), angles.sin().to(device)
        self.rotation = Rotation(*tables, rotary, interleaved) if rotary else None

    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (BLOCKS, self.heads[1], BLOCK, self.dim)
        k, v = (torch.full(shape, fill, device=self.device).to(self.cache_dtype) for fill in (7.0, -7.0))
        return k, v

    def separate(self, tile: Any, scales: Scales | None = None) -> tuple[torch.Tensor, ...]:
        product = gemv.few_rows_matmul(self.x, self.w, self.bias, scales or self.scales, tile=tile)
        q_heads, kv_heads = self.heads
        q, k, v = product.unflatten(1, (-1, self.dim)).split([q_heads, kv_heads, kv_heads], dim=1)
        caches, rotation = self.caches(), self.rotation
        cos, sin = (None, None) if rotation is None else (rotation.cos, rotation.sin)
        rotary, interleaved = (0, False) if rotation is None else (rotation.rotary_dim, rotation.interleaved)
        rope_and_cache(q, k, v, cos, sin, rotary, interleaved, *caches, self.slots, self.kv_scales)
        return q.flatten(1), *caches

    def fused(self, tile: Any, scales: Scales | None = None) -> tuple[torch.Tensor, ...]:
        caches = self.caches()
        place = KvPlace(*caches, self.slots, self.kv_scales, attend=None)  # type: ignore[arg-type]
        after = RopeCacheAfter(self.heads[0], place, self.rotation)
        q = gemv.few_rows_matmul(self.x, self.w, self.bias, scales or self.scales, tile=tile, after=after)
        return q, *caches

    def check(self, tile: Any, scales: Scales | None = None) -> None:
        if isinstance(tile, gemv.MatrixTile):  # sums without rounding: in which order they are made is not ours
            self.x, self.w = (x.float().round().to(x.dtype) for x in (self.x, self.w))
        for ours, theirs in zip(self.fused(tile, scales), self.separate(tile, scales), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(*(x.contiguous().view(torch.uint8) for x in (ours, theirs)))


@pytest.mark.parametrize("tile", [VECTORS, MATRICES], ids=["vectors", "matrices"])
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, BF16), (2, BF16), (3, BF16), (4, BF16), (3, FP16), (1, FP8), (2, FP8), (4, FP8)]
)
def test_dtypes_and_rows(rows: int, dtype: torch.dtype, tile: Any, device: str) -> None:
    for cache in (None, FP8):
        case = Case(device, rows=rows, dtype=dtype, cache=cache, has_bias=rows % 2 == 0)
        if cache == FP8 and rows > 1:
            case.kv_scales = torch.tensor([0.31, 0.002], device=device)  # the second one makes values saturate
        case.check(tile)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("dim", "rotary"), [(24, 24), (40, 16), (32, 24), (16, 2), (16, 0)])
def test_heads_that_rotate_whole_or_in_part(dim: int, rotary: int, interleaved: bool, device: str) -> None:
    Case(device, dim=dim, rotary=rotary, interleaved=interleaved).check(gemv.VectorTile(8, 2))
    if dim == 16:
        Case(device, dim=dim, rotary=rotary, interleaved=interleaved).check(gemv.VectorTile(2, 1))


@pytest.mark.parametrize("tile", [VECTORS, MATRICES], ids=["vectors", "matrices"])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (5, 1), (4, 2)])
def test_head_counts(heads: tuple[int, int], tile: Any, device: str) -> None:
    Case(device, heads=heads).check(tile)


def test_many_rows_by_matrix_units(device: str) -> None:
    Case(device, rows=11, dtype=FP8, cache=FP8, has_bias=True).check(MATRICES)


@pytest.mark.parametrize("tile", [VECTORS, MATRICES], ids=["vectors", "matrices"])
def test_scales_of_rows_and_outputs(tile: Any, device: str) -> None:
    case = Case(device, rows=3, dtype=FP8)
    generator = torch.Generator().manual_seed(3)
    scales = [torch.rand(shape, generator=generator).to(device) + 0.5 for shape in ((3, 1), (case.w.shape[0],))]
    case.check(tile, Scales(*scales, BF16))


@pytest.mark.parametrize("tile", [VECTORS, MATRICES], ids=["vectors", "matrices"])
def test_rows_without_a_slot_write_nothing(tile: Any, device: str) -> None:
    case = Case(device, rows=4)
    case.slots[1:] = -1
    case.check(tile)
    _, keys, values = case.fused(tile)
    written = case.slots[0].item()
    for cache, fill in ((keys, 7.0), (values, -7.0)):
        rows = cache.transpose(1, 2).reshape(BLOCKS * BLOCK, -1)
        assert (rows[torch.arange(len(rows), device=device) != written] == fill).all()
        assert (rows[written] != fill).any()


def test_cache_inside_a_larger_tensor(device: str) -> None:
    case = Case(device)
    k_cache, v_cache = torch.stack(case.caches(), dim=1).unbind(1)
    place = KvPlace(k_cache, v_cache, case.slots, None, attend=None)  # type: ignore[arg-type]
    gemv.few_rows_matmul(case.x, case.w, tile=VECTORS, after=RopeCacheAfter(2, place, case.rotation))
    _, keys, values = case.separate(VECTORS)
    assert torch.equal(k_cache, keys) and torch.equal(v_cache, values)


def test_what_does_not_fit_is_refused(device: str) -> None:
    case = Case(device, dim=24)
    for tile in (gemv.VectorTile(1, 1), MATRICES):
        with pytest.raises(ValueError, match="heads of 24 need"):
            case.fused(tile)
    case.w = case.w[:24]
    with pytest.raises(ValueError, match="is not 4 heads of 24"):
        case.fused(VECTORS)
    empty = Case(device, rows=0)
    assert empty.fused(VECTORS)[0].shape == (0, 32)
