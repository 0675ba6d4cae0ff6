"""Algorithms of cuBLASLt as matmul kernels: names, what they serve and what torch does; a stand-in is the library."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator

import pytest
import torch
from tests.support.fake_cublaslt import FakeCublasLt, algorithm, install

from lamella_core.engine import engine as engines
from lamella_core.engine.build_config import BuildConfig
from lamella_core.engine.engine import Engine
from lamella_core.errors import ConfigError
from lamella_core.kernels import cublaslt, cublaslt_library, gpu_matmul
from lamella_core.kernels.cublaslt import kernel_name
from lamella_core.kernels.cublaslt_library import Product
from lamella_core.kernels.fused import LEAST_ADDED_ROWS, AddAfter, FusedFunction, SiluGateAfter
from lamella_core.kernels.matmul import MatmulPlan, Scales, find_kernel
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM

FP8 = torch.float8_e4m3fn
NAME = kernel_name(130100, algorithm(1, workspace_bytes=4096))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCublasLt]:
    yield install(monkeypatch)
    cublaslt._prepared.cache_clear()


def test_a_name_holds_the_version_and_the_algorithm() -> None:
    kernel = find_kernel(NAME)
    assert isinstance(kernel, cublaslt.CublasLtMatmul) and kernel.name == NAME
    assert (kernel.version, kernel.algorithm) == (130100, algorithm(1, workspace_bytes=4096))
    plan = MatmulPlan("rows", ((16, "triton_gemv"), (512, NAME), (None, "cublas")))
    assert MatmulPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.device == "cuda" and plan.kernel_name(17) == NAME


@pytest.mark.parametrize("name", ["cublaslt:", "cublaslt:1:AAAA", "cublaslt:x:" + "A" * 86 + "==", NAME + "!"])
def test_a_damaged_name(name: str) -> None:
    with pytest.raises(ConfigError, match="64 bytes in base64"):
        MatmulPlan("rows", ((None, name),))


def test_what_a_kernel_serves(library: FakeCublasLt, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = find_kernel(NAME)
    assert all(kernel.available(dtype, 64, 32) for dtype in (torch.bfloat16, torch.float16, FP8))
    assert not kernel.available(torch.float32, 64, 32) and not kernel.available(torch.bfloat16, 40, 32)
    assert not find_kernel(kernel_name(130200, algorithm(1))).available(torch.bfloat16, 64, 32)
    monkeypatch.setattr(gpu_matmul, "capability", lambda: (8, 0))
    assert not kernel.available(FP8, 64, 32) and kernel.available(torch.bfloat16, 64, 32)
    monkeypatch.setattr(cublaslt, "library", lambda: None)
    assert not kernel.available(torch.bfloat16, 64, 32)


def test_there_is_no_library_without_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    find = cublaslt_library.library.__wrapped__
    monkeypatch.setattr(torch.version, "cuda", "97.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.INFO):
        assert find() is None
    assert "libcublasLt.so.97" in caplog.text


def test_proposals_need_little_workspace_and_have_one_order_of_sums(library: FakeCublasLt) -> None:
    loaded = cublaslt_library.library()
    assert loaded is not None
    product = Product(64, 32, 16, torch.bfloat16, torch.bfloat16)
    assert loaded.proposals(product, 8) == library.algorithms
    assert loaded.proposals(product, 2) == library.algorithms[:2]
    assert library.preferred == {1: 32 << 20, 3: 2}
    assert list(library.alive.values()) == ["handle"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
def test_products(dtype: torch.dtype, library: FakeCublasLt) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = find_kernel(NAME)
    w = torch.randn(32, 48, generator=generator).to(dtype)
    for m, factor in ((1, 1.0), (17, 0.5), (17, 3.0)):
        x = torch.randn(m, 48, generator=generator).to(dtype)
        scales = Scales(torch.tensor(factor), torch.tensor([2.0]), torch.bfloat16) if dtype == FP8 else None
        found = kernel(x, w, 32, None, scales)
        expected = x.double() @ w.double().t() * (2 * factor if dtype == FP8 else 1)
        assert found.dtype == (torch.bfloat16 if dtype == FP8 else dtype)
        assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert library.launched == [(1, 1), (1, 17), (1, 17)] and library.checks == 2


@pytest.mark.parametrize("case", ["bias", "strided", "float32", "scales", "refused", "alignment", "empty"])
def test_what_is_left_to_torch(case: str, library: FakeCublasLt, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = {"float32": torch.float32, "scales": FP8}.get(case, torch.bfloat16)
    m = {"refused": 301, "empty": 0}.get(case, 3)
    x, w = torch.randn(m, 48).to(dtype), torch.randn(32, 48).to(dtype)
    bias = torch.randn(32, dtype=torch.bfloat16) if case == "bias" else None
    scales = Scales(torch.rand(m, 1), torch.ones(()), torch.bfloat16) if case == "scales" else None
    if case == "strided":
        x = torch.randn(48, m).to(dtype).t()
    if case == "alignment":
        x = torch.randn(m * 48 + 1).to(dtype)[1:].view(m, 48)
        monkeypatch.setattr(cublaslt.library(), "alignment", 16)
    kernel = find_kernel(kernel_name(130100, algorithm(2, most_rows=300)))
    found = kernel(x, w, 32, bias, scales)
    torch_product = gpu_matmul.cublas_fp8 if case == "scales" else gpu_matmul.cublas
    assert torch.equal(found, torch_product(x, w, bias, scales)) and not library.launched


def fused_of(name: str) -> FusedFunction:
    fused = MatmulPlan("rows", ((None, name),)).fused(LEAST_ADDED_ROWS, 64, AddAfter)
    assert fused is not None
    return fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
def test_sums_by_the_plan_s_algorithm_or_the_first_proposal(dtype: torch.dtype, library: FakeCublasLt) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 48, generator=generator).to(dtype) for rows in (LEAST_ADDED_ROWS, 32))
    scales = Scales(torch.tensor(0.5), torch.tensor([2.0]), torch.bfloat16) if dtype == FP8 else None
    out_dtype = dtype if scales is None else scales.out_dtype
    default = "cublas" if scales is None else "cublas_fp8"
    for seed in range(2):
        summand = torch.randn(len(x), 32, generator=generator.manual_seed(seed)).to(out_dtype)
        held = summand.clone()
        expected = (x.double() @ w.double().t() + summand.double()).to(out_dtype)
        for name in (NAME, default):
            found = fused_of(name)(x, w, None, scales, AddAfter(summand))
            assert found is not None and found.data_ptr() != summand.data_ptr()
            assert torch.equal(found, expected) and torch.equal(summand, held)
    assert library.launched == [(1, len(x)), (0, len(x))] * 2 and library.checks == 2


@pytest.mark.parametrize("name", [NAME, "cublas"])
@pytest.mark.parametrize(
    "case", ["bias", "float32", "strided", "dtype", "shape", "scales", "refused", "gate", "library"]
)
def test_sums_that_are_left_to_others(
    case: str, name: str, library: FakeCublasLt, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = {"float32": torch.float32, "scales": FP8}.get(case, torch.bfloat16)
    m, n = LEAST_ADDED_ROWS, 32
    x, w, summand = torch.ones(m, 48).to(dtype), torch.ones(n, 48).to(dtype), torch.ones(m, n)
    if case == "strided":
        summand = torch.ones(n, m).t()
    if case == "shape":
        summand = torch.ones(n)
    summand = summand.to({"dtype": torch.float16, "float32": torch.float32}.get(case, torch.bfloat16))
    bias = torch.ones(n, dtype=dtype) if case == "bias" else None
    scales = Scales(torch.ones(m, 1), torch.ones(()), torch.bfloat16) if case == "scales" else None
    if case == "refused":
        name = kernel_name(130100, algorithm(2, most_rows=300))
    if case == "library":
        monkeypatch.setattr(cublaslt, "library", lambda: None)
    after = SiluGateAfter(None) if case == "gate" else AddAfter(summand)
    assert fused_of(name)(x, w, bias, scales, after) is None and not library.launched


def test_products_that_are_kept_ready_are_bounded(library: FakeCublasLt, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cublaslt._prepared.cache_info().maxsize == cublaslt.MOST_PREPARED
    bounded = cublaslt.functools.lru_cache(maxsize=2)(cublaslt._prepared.__wrapped__)
    monkeypatch.setattr(cublaslt, "_prepared", bounded)
    kernel, w = find_kernel(NAME), torch.randn(32, 48).bfloat16()
    for m in (5, 6, 7, 5):
        kernel(torch.randn(m, 48).bfloat16(), w, 32, None)
    assert library.checks == 4 and bounded.cache_info().currsize == 2
    assert len(library.alive) == 1 + 2 * 4  # the handle; what evicted products held is given back
    bounded.cache_clear()


def test_an_engine_of_another_version(
    library: FakeCublasLt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            architecture="LlamaForCausalLM", model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=32,
            max_position_embeddings=32, dtype="bfloat16",
        )
    )  # fmt: skip
    made = Engine.from_model(model)
    spec = dataclasses.replace(
        made.spec, gpu={"name": "G"}, build=dataclasses.replace(BuildConfig(), device="cuda"),
        plans={name: {"layout": "rows", "steps": [[None, NAME]]} for name in made.spec.plans},
    )  # fmt: skip
    engine = Engine(spec, {0: made.weights()})
    monkeypatch.setattr(engines.devices, "gpu_fingerprint", lambda: {"name": "G"})
    names = {plan.steps[-1][1] for plan in engine._attach_plans(model).values()}
    assert names == {NAME} and not caplog.records
    cublaslt.library().version = 130200
    names = {plan.steps[-1][1] for plan in engine._attach_plans(model).values()}
    assert names == {"cublas"}
    assert f"kernels of {len(spec.plans)} weights cannot run here" in caplog.text
