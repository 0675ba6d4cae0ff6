"""Decoder layers give the same with the gate in the product's kernel as without, and use that kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lamella_core import QuantConfig
from lamella_core.context import SingleRank
from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.fused import SiluGateAfter
from lamella_core.kernels.matmul import MatmulPlan
from lamella_core.kernels.triton import gemv
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.linear import Linear
from lamella_core.layers.mlp import MLP, GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.layers.parameter import set_parameter
from lamella_core.models.llama import LlamaConfig

HIDDEN, INNER, HEADS, HEAD = 64, 96, 4, 16
STATIC = QuantConfig("FP8")
DYNAMIC = QuantConfig("FP8", activation_scheme="dynamic")
PER_CHANNEL = QuantConfig("FP8_PER_CHANNEL_PER_TOKEN")


class Context:
    """Attention that sees a token alone."""

    tp = SingleRank()

    def attend(self, spec: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        return q + (k + v).repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)

    def kv_place(self, *_: Any) -> None:
        return None


def config_of(quantization: QuantConfig, act: str = "silu") -> LlamaConfig:
    return LlamaConfig(
        architecture="X", model_type="x", dtype="bfloat16", vocab_size=32, hidden_size=HIDDEN, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=HEAD, intermediate_size=INNER, hidden_act=act,
        max_position_embeddings=64, quantization=quantization,
    )  # fmt: skip


def decoder_layer(config: LlamaConfig, device: str, mlp: type[GatedMLP | MLP] = GatedMLP) -> DecoderLayer:
    """A layer of random weights, all products planned for the kernels of few rows."""
    layer = DecoderLayer(
        input_norm=RMSNorm(HIDDEN, 1e-5, torch.bfloat16),
        attention=Attention(config, 0, name="layers.0.attention", qkv_bias=True),
        mlp_norm=RMSNorm(HIDDEN, 1e-5, torch.bfloat16),
        mlp=mlp(config, name="layers.0.mlp", bias=True),
    )
    fill(layer, device)
    return layer


def fill(module: torch.nn.Module, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        if name.endswith("_scale"):
            values = values.abs() * 0.1 + 0.05
        set_parameter(module, name, values.to(parameter.dtype).to(device))
    for linear in (m for m in module.modules() if isinstance(m, Linear)):
        many = "torch_fp8_upcast" if linear.weight.dtype == torch.float8_e4m3fn else "cublas"
        linear.plan = MatmulPlan("rows", ((16, "triton_gemv"), (None, many)))


def stream(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randn(2, rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).bfloat16().to(device)
    return both[0], both[1]


def few_rows_tile(m: int, n: int, k: int, itemsize: int) -> gemv.VectorTile | gemv.MatrixTile:
    return gemv.VectorTile(32, 1) if m <= gemv.MOST_VECTOR_ROWS else gemv.MatrixTile(32, 32, 2, 2)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "default_tile", few_rows_tile)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the products that the gate was computed with."""
    found: list[int] = []
    few_rows = gemv.few_rows_matmul

    def watched(x: torch.Tensor, *args: Any, after: Any = None, **kwargs: Any) -> Any:
        if isinstance(after, SiluGateAfter):
            found.append(len(x))
        return few_rows(x, *args, after=after, **kwargs)

    monkeypatch.setattr(gemv, "few_rows_matmul", watched)
    return found


def allow(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(gpu_matmul, "MOST_GATED_ROWS", {1: rows, 2: rows})


@pytest.mark.parametrize(
    "quantization", [QuantConfig(), STATIC, DYNAMIC, PER_CHANNEL], ids=["bf16", "static", "dynamic", "channels"]
)
@pytest.mark.parametrize(("rows", "residual"), [(1, False), (3, True)])
def test_fused_layer_is_the_separate_one(
    rows: int, quantization: QuantConfig, residual: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    layer = decoder_layer(config_of(quantization), device)
    hidden, total = stream(rows, device)
    total_in = total if residual else None
    allow(monkeypatch, 0)
    expected = layer(hidden, total_in, None, Context())
    assert not calls
    allow(monkeypatch, 4)
    assert all(map(torch.equal, layer(hidden, total_in, None, Context()), expected))
    assert calls == [rows]


def test_only_few_rows_take_it(calls: list[int], device: str) -> None:
    for quantization, most in ((QuantConfig(), 4), (STATIC, 2)):
        layer = decoder_layer(config_of(quantization), device)
        for rows in (*range(1, 6), 20):
            layer(*stream(rows, device), None, Context())
        assert calls == list(range(1, most + 1))
        calls.clear()


def test_matrix_tiles_do_without(calls: list[int], monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(gemv, "default_tile", lambda *_: gemv.MatrixTile(32, 32, 2, 2))
    decoder_layer(config_of(QuantConfig()), device)(*stream(1, device), None, Context())
    assert not calls


@pytest.mark.parametrize("mlp", [GatedMLP, MLP])
def test_other_activations_stay_as_they_are(mlp: type[GatedMLP | MLP], calls: list[int], device: str) -> None:
    decoder_layer(config_of(QuantConfig(), "gelu"), device, mlp)(*stream(1, device), None, Context())
    assert not calls


def test_hooks_of_its_parts_run(calls: list[int], device: str) -> None:
    layer = decoder_layer(config_of(QuantConfig()), device)
    seen: list[str] = []
    for name, part in layer.named_children():
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(*stream(1, device), None, Context())
    assert calls == [1] and seen == ["input_norm", "attention", "mlp_norm", "mlp"]
