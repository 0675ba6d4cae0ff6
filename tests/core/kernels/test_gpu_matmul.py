"""CUDA kernels as far as a CPU shows them: the library functions also take CPU tensors; plans follow the capability."""

from __future__ import annotations

import pytest
import torch

from lamella_core.errors import ConfigError
from lamella_core.kernels import gpu_matmul, matmul
from lamella_core.kernels.matmul import MatmulPlan, Scales

FP8 = torch.float8_e4m3fn


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_matmul, "capability", lambda: (9, 0))


@pytest.mark.parametrize("function", [gpu_matmul.cublas_fp8, gpu_matmul.upcast_fp8])
@pytest.mark.parametrize("m", [0, 1, 3, 17])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float8_products(function, m: int, per_row: bool, per_output: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(m)
    x, w = (torch.randn(rows, 64, generator=generator).to(FP8) for rows in (m, 48))
    bias = torch.randn(48, generator=generator).to(dtype)
    x_scale = torch.rand((m, 1) if per_row else (), generator=generator) + 0.5
    w_scale = torch.rand((48,) if per_output else (), generator=generator) + 0.5
    out = function(x, w, bias, Scales(x_scale, w_scale, dtype))
    expected = x.double() @ w.double().t() * x_scale.double() * w_scale.double() + bias.double()
    assert out.dtype == dtype and out.shape == (m, 48)
    if m:
        assert (out.double() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_a_float8_product_needs_scales() -> None:
    x = torch.ones(1, 16).to(FP8)
    with pytest.raises(ValueError, match="scales"):
        gpu_matmul.cublas_fp8(x, x, None, None)


def test_float32_is_exact_and_the_process_keeps_its_precision() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        x, w = torch.randn(3, 64), torch.randn(16, 64)
        expected = x.double() @ w.double().t()
        assert (gpu_matmul.cublas(x, w, None).double() - expected).abs().max() < 1e-4
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_default_plans_on_a_gpu(hopper: None) -> None:
    def plan(dtype: torch.dtype, n: int = 4096, k: int = 4096) -> MatmulPlan:
        return matmul.default_plan(dtype, n, k, batch_invariant=False, device="cuda")

    assert plan(torch.bfloat16).steps == ((16, "triton_gemv"), (None, "cublas"))
    assert plan(torch.float32).steps == ((None, "cublas"),)
    assert plan(FP8).steps == ((16, "triton_gemv"), (None, "cublas_fp8"))
    assert plan(FP8, n=40).steps[-1] == (None, "torch_fp8_upcast")
    assert plan(torch.bfloat16, k=40).steps == ((None, "cublas"),)


def test_older_gpus_have_no_float8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_matmul, "capability", lambda: (8, 0))
    plan = matmul.default_plan(FP8, 64, 64, batch_invariant=False, device="cuda")
    assert {name for _, name in plan.steps} & {"cublas_fp8"} == set()
    assert plan.steps[-1] == (None, "torch_fp8_upcast")


def test_candidates_on_a_gpu_share_one_layout(hopper: None) -> None:
    for dtype in (torch.bfloat16, torch.float32, FP8):
        plans = matmul.candidate_plans(dtype, 64, 64, require_batch_invariant=False, device="cuda")
        assert plans and {plan.layout for plan in plans} == {"rows"}
        assert all(matmul.KERNELS[name].device == "cuda" for plan in plans for _, name in plan.steps)
        assert len(set(plans)) == len(plans)


def test_cpu_plans_have_no_gpu_kernels(hopper: None) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        plans = matmul.candidate_plans(dtype, 64, 64, require_batch_invariant=False)
        plans.append(matmul.default_plan(dtype, 64, 64, batch_invariant=False))
        assert all(matmul.KERNELS[name].device == "cpu" for plan in plans for _, name in plan.steps)


def test_other_layouts_are_refused_on_a_gpu(hopper: None) -> None:
    with pytest.raises(ConfigError, match="panel16.*GPU"):
        matmul.default_plan(torch.bfloat16, 64, 64, batch_invariant=False, layout="panel16", device="cuda")
