"""Decoder layers give the same with norm and gate in the products' kernels as without, and use those kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lamella_core import QuantConfig
from lamella_core.context import SingleRank
from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.matmul import MatmulPlan
from lamella_core.kernels.triton import gemv, normed_gemv
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.linear import Linear
from lamella_core.layers.mlp import MLP, FeedForward, GatedMLP
from lamella_core.layers.moe import SharedExpert
from lamella_core.layers.norm import LayerNorm, Norm, RMSNorm
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


def config_of(quantization: QuantConfig, act: str = "silu") -> LlamaConfig:
    return LlamaConfig(
        architecture="X", model_type="x", dtype="bfloat16", vocab_size=32, hidden_size=HIDDEN, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=HEAD, intermediate_size=INNER, hidden_act=act,
        max_position_embeddings=64, quantization=quantization,
    )  # fmt: skip


def decoder_layer(
    config: LlamaConfig, device: str, norm: type[Norm] = RMSNorm, mlp: type[GatedMLP | MLP] = GatedMLP
) -> DecoderLayer:
    """A layer of random weights, all products planned for the kernels of few rows."""
    layer = DecoderLayer(
        input_norm=norm(HIDDEN, 1e-5, torch.bfloat16),
        attention=Attention(config, 0, name="layers.0.attention", qkv_bias=True),
        mlp_norm=norm(HIDDEN, 1e-5, torch.bfloat16),
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
    monkeypatch.setattr(normed_gemv, "default_tile", lambda *_: normed_gemv.NormedTile(32, 1, 1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran of the fused kernels."""
    found: list[str] = []
    few_rows, normed = gemv.few_rows_matmul, normed_gemv.normed_matmul

    def watched_few(*args: Any, gate: Any = None, **kwargs: Any) -> Any:
        if gate is not None:
            found.append("gated")
        return few_rows(*args, gate=gate, **kwargs)

    def watched_normed(*args: Any, gate: Any = None, **kwargs: Any) -> Any:
        found.append("normed" if gate is None else "normed gated")
        return normed(*args, gate=gate, **kwargs)

    monkeypatch.setattr(gemv, "few_rows_matmul", watched_few)
    monkeypatch.setattr(normed_gemv, "normed_matmul", watched_normed)
    return found


def allow(monkeypatch: pytest.MonkeyPatch, gated_rows: int, normed_rows: int) -> None:
    for name, rows in (("MOST_GATED_ROWS", gated_rows), ("MOST_NORMED_ROWS", normed_rows)):
        monkeypatch.setattr(gpu_matmul, name, {1: rows, 2: rows})


def check_near(outs: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], bound: float) -> None:
    for out, right in zip(outs, expected, strict=True):
        assert out.dtype == right.dtype and out.shape == right.shape
        assert (out - right).abs().max() <= bound * right.abs().max()


@pytest.mark.parametrize(
    "quantization", [QuantConfig(), STATIC, DYNAMIC, PER_CHANNEL], ids=["bf16", "static", "dynamic", "channels"]
)
@pytest.mark.parametrize(("rows", "residual"), [(1, False), (3, True)])
def test_fused_layer_is_the_separate_one(
    rows: int, quantization: QuantConfig, residual: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    layer = decoder_layer(config_of(quantization), device)
    hidden, total = stream(rows, device)
    total_in = total if residual else None
    allow(monkeypatch, 0, 0)
    expected = layer(hidden, total_in, None, Context())
    assert not calls
    allow(monkeypatch, 4, 0)
    gated = layer(hidden, total_in, None, Context())
    assert calls == ["gated"] and all(map(torch.equal, gated, expected))
    calls.clear()
    allow(monkeypatch, 4, 4)
    is_dynamic = quantization in (DYNAMIC, PER_CHANNEL)
    check_near(layer(hidden, total_in, None, Context()), expected, 0.03)
    assert calls == (["gated"] if is_dynamic else ["normed", "normed gated"])


def test_many_rows_take_the_separate_kernels(calls: list[str], monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    allow(monkeypatch, 4, 4)
    layer = decoder_layer(config_of(QuantConfig()), device)
    for rows in (5, 20):
        layer(*stream(rows, device), None, Context())
    assert not calls


def test_selected_rows(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    allow(monkeypatch, 4, 4)
    layer = decoder_layer(config_of(QuantConfig()), device)
    rows = torch.tensor([0, 2], device=device)
    some, whole = (layer(*stream(3, device), None, Context(), chosen) for chosen in (rows, None))
    check_near(some, tuple(x[rows] for x in whole), 0.03)


@pytest.mark.parametrize("kind", ["layer norm", "gelu", "plain mlp", "another norm"])
def test_others_stay_as_they_are(kind: str, calls: list[str], monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    class Doubled(RMSNorm):
        def forward(self, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            normed, total = super().forward(x, *args)
            return normed * 2, total

    norm: type[Norm] = {"layer norm": LayerNorm, "another norm": Doubled}.get(kind, RMSNorm)
    act = "gelu" if kind in ("gelu", "plain mlp") else "silu"
    layer = decoder_layer(config_of(QuantConfig(), act), device, norm, MLP if kind == "plain mlp" else GatedMLP)
    hidden, residual = stream(1, device)
    allow(monkeypatch, 0, 0)
    expected = layer(hidden, residual, None, Context())
    allow(monkeypatch, 4, 4)
    check_near(layer(hidden, residual, None, Context()), expected, 0.03)
    has_rms_norm, has_silu = norm is RMSNorm, act == "silu"
    assert ("normed" in calls) == has_rms_norm
    assert [c for c in calls if "gated" in c] == (["gated"] if has_silu else [])


def test_a_shared_expert_gates_what_was_normed(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    expert = SharedExpert(config_of(QuantConfig()), inner=32, name="layers.0.mlp.shared", is_gated=True)
    norm = RMSNorm(HIDDEN, 1e-5, torch.bfloat16)
    fill(expert, device), fill(norm, device)
    hidden, residual = stream(2, device)
    allow(monkeypatch, 4, 4)
    expected = FeedForward.after_norm(expert, norm, hidden, residual, Context())
    assert all(map(torch.equal, expert.after_norm(norm, hidden, residual, Context()), expected))
