"""The host's part of the gated product: where operands lie, what is computed for how many rows, when it is offered."""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.cpu import build
from lamella_core.kernels.cuda import driver, gated_product
from lamella_core.kernels.fused import AddAfter, RopeCacheAfter, SiluGateAfter
from lamella_core.kernels.matmul import KERNELS, MatmulPlan
from lamella_core.quantization import fp8
from lamella_core.quantization.config import QuantConfig

ORDER = """
#define __device__
#include "gated_pairs.h"
extern "C" int group() { return GROUP; }
extern "C" int count(int rows, int tiles, int halved) { return Pairs(rows, tiles, halved).count; }
extern "C" void order(int rows, int tiles, int halved, Unit* units) {
  const Pairs pairs(rows, tiles, halved);
  for (int turn = 0; turn < pairs.count; turn++)
    for (int rank = 0; rank < 2; rank++) units[2 * turn + rank] = pairs.unit(turn, rank);
}
"""
SIZES = [
    (rows, tiles)
    for rows in (1, 128, 129, 256, 300, 384, 640, 2048, 2176, 2177, 2304, 2400, 4096, 4224, 6100)
    for tiles in (1, 2, 3, 7, 112)
]


class Unit(ctypes.Structure):
    """As in the source."""

    row: int
    tile: int
    is_wide: bool
    is_half: bool
    half: int
    _fields_ = (
        ("row", ctypes.c_int), ("tile", ctypes.c_int), ("is_wide", ctypes.c_bool), ("is_half", ctypes.c_bool),
        ("half", ctypes.c_int),
    )  # fmt: skip


class Order(NamedTuple):
    """The kernel's order, of the host's compiler."""

    group: int
    of: Callable[[int, int, int], list[tuple[Unit, Unit]]]  # (rows, tiles, halved): both blocks' units of each turn


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Order:
    try:
        compiler = build._find_toolchain().command
    except build._Unavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("order")
    (folder / "order.cpp").write_text(ORDER)
    headers = f"-I{Path(gated_product.__file__).parent}"
    subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", headers, "order.cpp", "-o", "order.so"],
        cwd=folder, check=True, timeout=60,
    )  # fmt: skip
    library = ctypes.CDLL(str(folder / "order.so"))

    def of(rows: int, tiles: int, halved: int) -> list[tuple[Unit, Unit]]:
        units = (Unit * (2 * library.count(rows, tiles, halved)))()
        library.order(rows, tiles, halved, units)
        return list(zip(units[::2], units[1::2], strict=True))

    return Order(library.group(), of)


class Boxes:
    """A tensor map's boxes, cut from the tensor itself in place of the driver's description."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __call__(self, address: int, dtype: torch.dtype, sizes: Any, strides: Any, box: tuple[int, ...]) -> bytes:
        size = self.tensor.element_size()
        assert (address, dtype) == (self.tensor.data_ptr(), self.tensor.dtype) and box[0] * size == 128
        steps = [1, *(stride // size for stride in strides)]
        self.view = self.tensor.as_strided(sizes[::-1], steps[::-1])  # its last place is the tensor's
        assert sum((count - 1) * step for count, step in zip(sizes, steps, strict=True)) == self.tensor.numel() - 1
        self.box = box
        return b""


@pytest.mark.parametrize("run", [8, 16])
def test_a_thread_finds_gate_and_up_of_outputs_side_by_side(run, monkeypatch):
    """As the kernel does: a tile has 256 weight rows, of which a thread sees 8 j + 2 quarter + e."""
    width, k = 384, 128
    weight = (
        torch.arange(2 * width, dtype=torch.int16).repeat_interleave(k).view(2 * width, k)
    )  # numbers are their rows
    boxes = Boxes(weight)
    monkeypatch.setattr(driver, "tensor_map", lambda *arguments: boxes(*arguments) if len(arguments[2]) > 2 else b"")
    gated_product._maps(weight[:1], weight, run)
    assert boxes.box == (64, 2, 4, run, 1)
    parts = 128 // (4 * run)
    for tile in range(width // 128):
        rows = [boxes.view[tile * parts + part, :run, :4, :2, 0].flatten() for part in range(parts)]
        rows = torch.cat(rows).view(32, 4, 2)  # j, quarter, e
        for quarter in range(4):
            for j in range(32):
                output = tile * 128 + j // run * 4 * run + quarter * run + j % run
                assert rows[j, quarter].tolist() == [output, width + output]


@pytest.mark.parametrize("part_halved", [0.0, 0.4, 1.0])
def test_each_half_of_each_tile_is_computed_once(part_halved, order):
    for rows, tiles in SIZES:
        pairs = gated_product.num_pairs(rows, tiles)
        halved = int(part_halved * pairs)
        turns = order.of(rows, tiles, halved)
        assert len(turns) == pairs + halved
        assert [first.is_half for first, _ in turns] == [False] * (pairs - halved) + [True] * (2 * halved)
        computed: Counter[tuple[int, int, int]] = Counter()
        for first, second in turns:
            if first.is_wide:
                assert (second.row, second.tile) == (first.row, first.tile + 1)
            else:
                assert (second.row, second.tile) == (first.row + 128, first.tile)
            assert (first.is_wide, first.is_half, first.half) == (second.is_wide, second.is_half, second.half)
            for unit in (first, second):
                halves = (unit.half,) if unit.is_half else (0, 1)
                computed.update((unit.row, unit.tile, half) for half in halves if unit.tile < tiles)
        wanted = {(row, tile, half) for row in range(0, rows, 128) for tile in range(tiles) for half in (0, 1)}
        assert computed == dict.fromkeys(wanted, 1)


@pytest.mark.parametrize("part_halved", [0.0, 0.4])
def test_a_group_of_rows_reads_weights_from_memory_once(part_halved, order):
    """A cache that holds the two tiles of weights that were read last suffices."""
    for rows, tiles in SIZES:
        cache: deque[int] = deque(maxlen=2)
        missed: Counter[int] = Counter()
        for turn in order.of(rows, tiles, int(part_halved * gated_product.num_pairs(rows, tiles))):
            for tile in {unit.tile for unit in turn if unit.tile < tiles} - set(cache):
                cache.append(tile)
                missed[tile] += 1
        tall = -(-rows // 128) // 2
        groups = max(1, -(-tall // order.group))
        assert all(missed[tile] <= groups for tile in range(tiles)) and len(missed) == tiles


@pytest.mark.parametrize(
    ("rows", "tiles", "pairs"),
    [(0, 112, 0), (1, 112, 56), (128, 112, 56), (129, 112, 112), (256, 112, 112), (300, 112, 168), (385, 112, 224),
     (1, 3, 2), (8192, 112, 3584)],
)  # fmt: skip
def test_pairs_cover_all_rows_and_tiles(rows, tiles, pairs):
    assert gated_product.num_pairs(rows, tiles) == pairs
    used = gated_product.used_part(rows, tiles, 66)
    assert 0 <= used <= 1 and (used > 0) == (rows > 0)


def test_the_used_part_counts_what_is_wanted():
    assert gated_product.used_part(256, 66, 66) == 1.0
    assert gated_product.used_part(64, 112, 56) == 0.5  # half the rows of wide pairs
    assert gated_product.used_part(512, 80, 100) == 0.8
    assert gated_product.used_part(512, 66, 100) == pytest.approx(1.32 / 1.55)  # the last 32 pairs in halves


def test_a_half_empty_turn_is_computed_in_halves():
    halved = [gated_product.num_halved(pairs, 66) for pairs in (1, 33, 34, 66, 67, 99, 100, 132)]
    assert halved == [1, 33, 0, 0, 1, 33, 0, 0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that computes 66 pairs at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gated_product, "_pairs_at_once", lambda _: 66)


@pytest.mark.parametrize("name", ["cublas", "cublas_fp8"])
def test_plans_offer_it_where_it_is_faster(name, gpu, monkeypatch):
    plan = MatmulPlan("rows", ((None, name),))
    several = (64, 128, 256, 300, 384, 640, 800, 1024, 2048, 8192)
    assert [rows for rows in several if plan.fused(rows, 28672, SiluGateAfter)] == [
        128,
        256,
        384,
        640,
        1024,
        2048,
        8192,
    ]
    assert plan.fused(8192, 28672 + 128, SiluGateAfter) is None
    assert plan.fused(8192, 28672, RopeCacheAfter) is None
    assert plan.fused(4096, 4096, AddAfter) is not None and plan.fused(4095, 4096, AddAfter) is None
    for step in (SiluGateAfter, AddAfter):
        assert plan.fused(8192, 28672, step, is_plain=False) is None
    monkeypatch.setattr(gated_product, "_pairs_at_once", lambda _: 0)  # of another kind
    assert plan.fused(8192, 28672, SiluGateAfter) is None


def test_nothing_is_quantized_for_a_question_that_is_declined(gpu, monkeypatch):
    """Weights with a scale per output, and a bias."""
    quantized: list[int] = []
    monkeypatch.setattr(fp8, "quantize_per_token", lambda x: quantized.append(len(x)))
    method = fp8.Fp8PerChannel(QuantConfig("FP8_PER_CHANNEL_PER_TOKEN"))
    layer = SimpleNamespace(
        plan=MatmulPlan("rows", ((None, "cublas_fp8"),)), out_features_local=28672, weight_scale=torch.ones(28672)
    )
    x = torch.ones(2048, 8)
    assert method.apply_fused(layer, x, None, SiluGateAfter(None)) is None
    layer.weight_scale = torch.ones(())
    assert method.apply_fused(layer, x, torch.ones(28672), SiluGateAfter(None)) is None and not quantized


def test_without_a_gpu_nothing_is_offered_or_served():
    assert not gated_product.offers(8192, 28672) and not gpu_matmul.many_rows_offer(8192, 28672, SiluGateAfter, True)
    x, w = torch.ones(256, 64).bfloat16(), torch.ones(256, 64).bfloat16()
    assert KERNELS["cublas"].fused(x, w, None, None, SiluGateAfter(None)) is None


def test_a_kernel_that_cannot_be_made_is_said_once_and_not_served(monkeypatch, caplog):
    def missing(*_: Any) -> bytes:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(driver, "kept_code", missing)
    gated_product._kernel.cache_clear()
    try:
        assert gated_product._kernel(True, True, True, 0) is None and gated_product._kernel(True, True, True, 0) is None
    finally:
        gated_product._kernel.cache_clear()
    assert [record.message for record in caplog.records] == [
        "gates follow products in kernels of their own on GPU 0: libnvrtc.so.13: cannot open shared object file"
    ]
