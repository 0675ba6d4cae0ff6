"""Decisions of a build for a GPU, on machines without one: memory, rows, kernels that fail."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lamella_builder import BuildConfig, build, report
from lamella_builder.cli import app
from lamella_builder.steps import gpu_timing, kernels, memory
from lamella_builder.steps.kernels import Shape, row_counts
from lamella_core import device as devices
from lamella_core import disk_cache
from lamella_core.errors import ConfigError, OutOfMemoryError
from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.matmul import MatmulPlan, candidate_plans
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM
from lamella_core.quantization.config import QuantAlgo, QuantConfig

CUDA = BuildConfig(max_batch_size=4, max_num_tokens=64, max_seq_len=32, device="cuda")
LARGE = Shape(4096, 4096, torch.bfloat16, False)


def config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "max_position_embeddings": 128, "dtype": "bfloat16", **changes,
    }  # fmt: skip
    return LlamaConfig(**fields)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU on which nothing was timed before."""
    monkeypatch.setattr(disk_cache, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(kernels, "gpu_environment", lambda: {"gpu": "one"})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free and total bytes of a GPU on which decisions are made."""
    sizes = [70 << 30, 80 << 30]
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    monkeypatch.setattr(memory, "free_gpu_bytes", lambda: tuple(sizes))
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: tuple(sizes))
    monkeypatch.setattr(gpu_matmul, "capability", lambda: (9, 0))
    return sizes


def test_the_memory_plan_is_about_the_gpu(free: list[int]) -> None:
    plan = memory.plan_memory(config(), CUDA)
    assert (plan.device, plan.available_bytes, plan.total_bytes) == ("cuda", *free)
    plan.check()
    console = Console(record=True, width=120, file=io.StringIO())
    report.show_plan(console, config(), CUDA.resolved(config()), plan)
    text = console.export_text()
    assert "GPU" in text and "70.00 GiB of 80.00 GiB" in text


def test_a_float8_cache_takes_half_the_memory(free: list[int]) -> None:
    quantized = config(quantization=QuantConfig(kv_cache_quant_algo=QuantAlgo.FP8))
    plain = memory.plan_memory(config(), CUDA)
    assert memory.plan_memory(quantized, CUDA).kv_bytes_per_token * 2 == plain.kv_bytes_per_token


def test_a_plan_that_the_gpu_cannot_hold(free: list[int]) -> None:
    free[:] = [1 << 20, 80 << 30]
    with pytest.raises(OutOfMemoryError, match=r"free.*other processes on the GPU.*device='cpu'") as caught:
        memory.plan_memory(config(), CUDA).check()
    assert "of the GPU's 80.00 GiB" in str(caught.value)
    free[0] = (1 << 30) + (8 << 20)  # holds the weights, not the step
    limits = BuildConfig(max_batch_size=512, max_num_tokens=8192, max_seq_len=128, device="cuda")
    with pytest.raises(OutOfMemoryError, match=r"running takes.*Lower max_seq_len.*max_batch_size.*device='cpu'"):
        memory.plan_memory(config(vocab_size=32000, hidden_size=16), limits).check()


def test_rows_that_are_timed_on_a_gpu() -> None:
    assert row_counts(LARGE, BuildConfig(max_batch_size=256, opt_num_tokens=256, device="cuda")) == [1, 4, 16, 256]
    few = BuildConfig(max_batch_size=2, max_num_tokens=8, opt_num_tokens=2, device="cuda")
    assert row_counts(LARGE, few) == [1, 2, 4]


def members(count: int) -> list[Any]:
    """Weights that say they are on a GPU; with biases, so that the library's own algorithms are not timed."""
    weight, module = SimpleNamespace(device=SimpleNamespace(type="cuda")), SimpleNamespace(bias=object())
    return [SimpleNamespace(weight=weight, is_stacked=False, module=module) for _ in range(count)]


def test_a_kernel_that_fails_is_not_chosen(free: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(
        plans: list[MatmulPlan], rows: list[int], weights: list[Any], dtype: torch.dtype
    ) -> list[dict[int, float]]:
        assert len(weights) == 3 and dtype == torch.bfloat16
        return [{m: math.inf if plan.kernel_name(m) == "triton_gemv" else 1.0 for m in rows} for plan in plans]

    monkeypatch.setattr(kernels, "time_gpu_plans", fake)
    choice = kernels._choose(LARGE, members(3), BuildConfig(dtype="bfloat16", opt_num_tokens=64, device="cuda"))
    assert choice.plan.steps == ((None, "cublas"),) and choice.count == 3
    assert [plan.steps for plan, _ in choice.milliseconds] == [((None, "cublas"),)]


def test_choices_are_kept_unless_something_failed(
    free: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[bool] = []

    def fake(plans: list[MatmulPlan], rows: list[int], *_: Any) -> list[dict[int, float]]:
        fails = not calls
        calls.append(fails)
        return [{m: math.inf if fails and not i else 1.0 + i for m in rows} for i, _ in enumerate(plans)]

    monkeypatch.setattr(kernels, "time_gpu_plans", fake)
    limits = BuildConfig(dtype="bfloat16", opt_num_tokens=64, device="cuda")
    kernels._choose(LARGE, members(1), limits)
    assert not list(tmp_path.rglob("*.json"))
    first = kernels._choose(LARGE, members(1), limits)
    with caplog.at_level("INFO"):
        again = kernels._choose(LARGE, members(3), limits)
    assert len(calls) == 2 and again.plan == first.plan and again.count == 3 and not again.milliseconds
    (file,) = (tmp_path / "timings").iterdir()
    assert f"delete {file} to time again" in caplog.text


@pytest.mark.parametrize("change", ["gpu", "rows", "damaged", "kernel", "other key"])
def test_choices_of_something_else_are_not_taken(
    change: str, free: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fake(plans: list[MatmulPlan], rows: list[int], *_: Any) -> list[dict[int, float]]:
        calls.append(len(rows))
        return [dict.fromkeys(rows, 1.0) for _ in plans]

    monkeypatch.setattr(kernels, "time_gpu_plans", fake)
    limits = BuildConfig(dtype="bfloat16", opt_num_tokens=64, device="cuda")
    kernels._choose(LARGE, members(1), limits)
    (file,) = (tmp_path / "timings").iterdir()
    if change == "gpu":
        monkeypatch.setattr(kernels, "gpu_environment", lambda: {"gpu": "another"})
    elif change == "rows":
        limits = dataclasses.replace(limits, opt_num_tokens=128)
    elif change == "damaged":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        record = json.loads(file.read_bytes())
        if change == "kernel":
            record["plan"]["steps"][-1][1] = "gone"
        else:
            record["key"]["n"] = 1
        file.write_text(json.dumps(record))
    kernels._choose(LARGE, members(1), limits)
    assert len(calls) == 2
    assert ("is damaged" in caplog.text) == (change in ("damaged", "kernel"))
    kernels._choose(LARGE, members(1), limits)
    assert len(calls) == 2


def test_the_fastest_kernels_of_each_row_count_are_chosen(free: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    best = {1: "triton_gemv", 4: "triton_gemv", 16: "cublas", 64: "cublas"}

    def fake(plans: list[MatmulPlan], rows: list[int], *_: Any) -> list[dict[int, float]]:
        return [{m: 1.0 if plan.kernel_name(m) == best[m] else 2.0 for m in rows} for plan in plans]

    monkeypatch.setattr(kernels, "time_gpu_plans", fake)
    limits = BuildConfig(dtype="bfloat16", opt_num_tokens=64, device="cuda")
    assert kernels._choose(LARGE, members(1), limits).plan.steps == ((4, "triton_gemv"), (None, "cublas"))
    default = BuildConfig(dtype="bfloat16", kernel_selection="default", device="cuda")
    assert not kernels._choose(LARGE, members(1), default).milliseconds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_each_kernel_is_timed_once_per_row_count(
    dtype: torch.dtype, free: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = candidate_plans(dtype, 64, 32, require_batch_invariant=False, device="cuda")
    plans = [plan for plan in plans if plan.kernel_name(1) != "triton_gemv"]  # the others take CPU tensors as well
    launched = []

    def fake(run: Any, launches: int) -> float:
        run()
        launched.append(launches)
        if len(launched) == 2:
            raise RuntimeError("out of something\nand more")
        return 0.5

    monkeypatch.setattr(gpu_timing, "graph_seconds", fake)
    weights = [torch.randn(64, 32).to(dtype) for _ in range(6)]
    timed = gpu_timing.time_gpu_plans([*plans, *plans], [2, 3], weights, torch.bfloat16)
    assert len(launched) == 2 * len(plans) and set(launched) == {6}
    assert timed[0] == timed[len(plans)]
    assert sorted(ms for times in timed[: len(plans)] for ms in times.values())[-1] == math.inf


def test_a_build_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "there is none")
    with pytest.raises(ConfigError, match="there is none; use device='cpu'"):
        build(LlamaForCausalLM(config()), CUDA)


def test_the_command_takes_a_device() -> None:
    result = CliRunner().invoke(app, ["--model", "x", "--device", "tpu"])
    assert result.exit_code == 1 and "BuildConfig.device is 'tpu'" in result.output
