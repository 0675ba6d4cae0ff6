"""The host's part of the gated product: where operands lie, what is computed for how many rows, when it is offered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.cuda import driver, gated_product
from lamella_core.kernels.fused import AddAfter, RopeCacheAfter, SiluGateAfter
from lamella_core.kernels.matmul import KERNELS, MatmulPlan
from lamella_core.quantization import fp8
from lamella_core.quantization.config import QuantConfig


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
    assert gated_product.used_part(64, 66, 66) == 0.25  # half the rows of half the pairs
    assert gated_product.used_part(512, 66, 100) == 0.66


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that computes 66 pairs at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gated_product, "_pairs_at_once", lambda _: 66)


@pytest.mark.parametrize("name", ["cublas", "cublas_fp8"])
def test_plans_offer_it_where_it_is_faster(name, gpu, monkeypatch):
    plan = MatmulPlan("rows", ((None, name),))
    offered = [rows for rows in (64, 128, 256, 384, 640, 1024, 2048, 8192) if plan.fused(rows, 28672, SiluGateAfter)]
    assert offered == [128, 256, 1024, 2048, 8192]
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

    monkeypatch.setattr(driver, "compile_source", missing)
    gated_product._kernel.cache_clear()
    try:
        assert gated_product._kernel(True, True, True, 0) is None and gated_product._kernel(True, True, True, 0) is None
    finally:
        gated_product._kernel.cache_clear()
    assert [record.message for record in caplog.records] == [
        "gates follow products in kernels of their own on GPU 0: libnvrtc.so.13: cannot open shared object file"
    ]
