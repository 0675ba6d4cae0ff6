"""Layers whose projection stores keys and values itself give the bits of those that leave it to attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="GPU kernels need triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here: tests/gpu runs them", allow_module_level=True)

from tests.support.triton_interpreter import repair_interpreter

from lamella_core import QuantConfig
from lamella_core.context import SingleRank
from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.matmul import MatmulPlan
from lamella_core.kernels.triton import gemv
from lamella_core.layers.attention import Attention
from lamella_core.layers.head_norm import HeadRMSNorm
from lamella_core.layers.linear import Linear
from lamella_core.layers.parameter import set_parameter
from lamella_core.layers.rotary import Rotation
from lamella_core.models.llama import LlamaConfig
from lamella_executor.attention.paged_cpu import LayerWindow
from lamella_executor.attention.paged_cuda import CudaStepContext, DeviceKvCache, triton_rope_and_cache

repair_interpreter()

HIDDEN, HEADS, KV_HEADS, HEAD = 32, 2, 1, 16
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
QUANTIZED = QuantConfig("FP8", kv_cache_quant_algo="FP8")


class Attended:
    """A `StepAttention` that adds up a query and the cache; notes whether it was given keys of its own."""

    has_own = False

    def decode(self, q: torch.Tensor, layer: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        self.has_own = layer.own is not None
        return (q + (layer.k_cache.float().sum() + layer.v_cache.float().sum())).to(q.dtype)

    prefill = decode


def config_of(quantization: QuantConfig) -> LlamaConfig:
    return LlamaConfig(
        architecture="X", model_type="x", dtype="bfloat16", vocab_size=32, hidden_size=HIDDEN, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, intermediate_size=8, hidden_act="silu",
        max_position_embeddings=64, quantization=quantization,
    )  # fmt: skip


def attention(quantization: QuantConfig | None = None, **options: Any) -> Attention:
    """A layer of random weights, its products planned for the kernels of few rows."""
    layer = Attention(config_of(quantization or QuantConfig()), 0, name="attention", qkv_bias=True, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        if name.endswith(("_scale", "_scales")):
            values = values.abs() * 0.1 + 0.05
        set_parameter(layer, name, values.to(parameter.dtype))
    for linear in (m for m in layer.modules() if isinstance(m, Linear)):
        many = "torch_fp8_upcast" if linear.weight.dtype == FP8 else "cublas"
        linear.plan = MatmulPlan("rows", ((16, "triton_gemv"), (None, many)))
    return layer


def rotation_of(rows: int, **scales: torch.Tensor) -> Rotation:
    angles = torch.rand(rows, HEAD // 2, generator=torch.Generator().manual_seed(1)) * 90
    return Rotation(angles.cos(), angles.sin(), HEAD, False, **scales)


class Run:
    """One layer's step of some decoding rows, or of prompts; ``rotated`` counts who rotates outside the projection."""

    def __init__(self, layer: Attention, rows: int, rotation: Rotation | None, num_whole: int = 0) -> None:
        self.rotated = 0
        cache = DeviceKvCache([layer.spec], 4, 4, BF16 if layer.kv_scales is None else FP8, "cpu")
        step = SimpleNamespace(num_decode=0 if num_whole else rows, num_whole=num_whole)
        self.attended = Attended()
        slots = torch.arange(rows) * 2
        slots[rows // 2 + 1 :] = -1
        ctx = CudaStepContext(
            cache, slots, step, self.attended, self.rope_and_cache, {0: LayerWindow()}, SingleRank()
        )  # fmt: skip
        x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).bfloat16()
        self.results = (layer(x, rotation, ctx), *(part.float() for part in cache.layer(0)))

    def rope_and_cache(self, *args: Any) -> None:
        self.rotated += 1
        triton_rope_and_cache(*args)


def tile_of(m: int, n: int, k: int, itemsize: int) -> gemv.VectorTile | gemv.MatrixTile:
    return gemv.VectorTile(16, 1) if m <= gemv.MOST_VECTOR_ROWS else gemv.MatrixTile(32, 32, 2, 2)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "default_tile", tile_of)
    monkeypatch.setattr(gpu_matmul, "MOST_STORED_ROWS", gpu_matmul.MOST_GEMV_ROWS)


@pytest.mark.parametrize("quantization", [None, QUANTIZED], ids=["bf16", "float8"])
@pytest.mark.parametrize("has_rotation", [True, False], ids=["rotated", "plain"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_projection_stores(rows, has_rotation, quantization, monkeypatch):
    layer, rotation = attention(quantization), rotation_of(rows) if has_rotation else None
    placed = Run(layer, rows, rotation)
    monkeypatch.setattr(CudaStepContext, "kv_place", lambda *_: None)
    separate = Run(layer, rows, rotation)
    assert (placed.rotated, separate.rotated) == (0, 1)
    assert placed.results[1].any() and placed.results[2].any()
    assert all(map(torch.equal, placed.results, separate.results))


def test_more_rows_stay_separate_as_long_as_their_bits_may_differ(monkeypatch):
    monkeypatch.undo()
    assert [Run(attention(), rows, rotation_of(rows)).rotated for rows in (1, 2, 4)] == [0, 1, 1]


def test_what_comes_between_keeps_it_separate():
    norm = HeadRMSNorm(config_of(QuantConfig()))
    factor = torch.full((1, 1, 1), 1.5)
    for options in ({"q_norm": norm}, {"k_norm": norm}, {"clip_qkv": 0.5}, {"has_gate": True}):
        assert Run(attention(**options), 1, rotation_of(1)).rotated == 1
    assert Run(attention(), 1, rotation_of(1, query_scale=factor)).rotated == 1
    assert Run(attention(use_rope=False), 1, rotation_of(1, unrotated_scale=factor)).rotated == 1
    assert Run(attention(use_rope=False), 1, rotation_of(1)).rotated == 0


def test_what_the_kernel_does_not_serve_stays_separate():
    assert Run(attention(), 17, rotation_of(17)).rotated == 1  # rows of another kernel
    assert Run(attention(), 5, rotation_of(5)).rotated == 1  # a tile that is wider than a head


def test_prompts_over_a_float8_cache_keep_their_own_keys():
    run = Run(attention(QUANTIZED), 3, rotation_of(3), num_whole=1)
    assert run.rotated == 1 and run.attended.has_own
