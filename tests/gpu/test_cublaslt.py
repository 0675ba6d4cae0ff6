"""Algorithms of cuBLASLt on a GPU: each proposal's product, in graphs and on several streams, and engines with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.gpu.test_device_build import config
from tests.support.engines import executor_of, prompt_logprobs

from lamella_builder import BuildConfig, build
from lamella_builder.steps import gpu_algorithms
from lamella_core.engine import Engine
from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.cublaslt import kernel_name
from lamella_core.kernels.cublaslt_library import Library, Product, library
from lamella_core.kernels.fused import LEAST_ADDED_ROWS, AddAfter
from lamella_core.kernels.matmul import MatmulKernel, MatmulPlan, Scales, find_kernel
from lamella_core.models.llama import LlamaForCausalLM
from lamella_executor import SamplingParams

N, K = 4096, 2048
ROWS = (1, 17, 64, 200, 448, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@pytest.fixture
def loaded() -> Library:
    found = library()
    if found is None:
        pytest.skip("torch's cuBLASLt is linked in and cannot be called")
    assert found.is_ready()
    return found


def operands(m: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Scales | None]:
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products on this GPU")
    generator = torch.Generator("cuda").manual_seed(seed)
    x, w = (torch.randn(rows, K, device="cuda", generator=generator).to(dtype) for rows in (m, N))
    if dtype != torch.float8_e4m3fn:
        return x, w, None
    return x, w, Scales(torch.tensor(0.5, device="cuda"), torch.tensor(0.25, device="cuda"), torch.bfloat16)


def proposed(loaded: Library, m: int, dtype: torch.dtype) -> list[bytes]:
    out_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    found = loaded.proposals(Product(m, N, K, dtype, out_dtype), 8)
    assert found
    return found


def kernels_of(loaded: Library, dtype: torch.dtype) -> list[MatmulKernel]:
    algorithms = {algorithm: None for m in ROWS for algorithm in proposed(loaded, m, dtype)}
    return [find_kernel(kernel_name(loaded.version, algorithm)) for algorithm in algorithms]


def by_torch(x: torch.Tensor, w: torch.Tensor, scales: Scales | None) -> torch.Tensor:
    return gpu_matmul.cublas(x, w, None) if scales is None else gpu_matmul.cublas_fp8(x, w, None, scales)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    difference = (found.float() - expected.float()).abs()
    assert bool((difference <= 2**-7 * expected.float().abs() + 2**-9 * expected.float().abs().max()).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_proposal_serves_its_product_and_is_right(dtype: torch.dtype, loaded: Library) -> None:
    for m in ROWS:
        x, w, scales = operands(m, dtype)
        expected = by_torch(x, w, scales)
        product = Product(m, N, K, dtype, expected.dtype)
        for algorithm in proposed(loaded, m, dtype):
            prepared = loaded.prepare(algorithm, product)
            assert prepared is not None
            found = prepared.run(x, w, scales)
            assert_near(found, expected)
            assert torch.equal(found, prepared.run(x, w, scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_algorithm_serves_other_row_counts_or_torch_does(dtype: torch.dtype, loaded: Library) -> None:
    served = 0
    for m in (*ROWS, 333):
        x, w, scales = operands(m, dtype)
        expected = by_torch(x, w, scales)
        for kernel in kernels_of(loaded, dtype):
            assert kernel.available(dtype, N, K)
            assert_near(kernel(x, w, N, None, scales), expected)
            served += loaded.prepare(kernel.algorithm, Product(m, N, K, dtype, expected.dtype)) is not None
    assert served > 7 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_computes_the_same_bits(dtype: torch.dtype, loaded: Library) -> None:
    x, w, scales = operands(64, dtype)
    kernels = kernels_of(loaded, dtype)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    eager = [kernel(x, w, N, None, scales) for kernel in kernels]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        recorded = [kernel(x, w, N, None, scales) for kernel in kernels]
    other = operands(64, dtype, seed=1)[0]
    for inputs in (x.clone(), other):
        x.copy_(inputs)
        graph.replay()
        again = [kernel(x, w, N, None, scales) for kernel in kernels]
        assert all(torch.equal(one, two) for one, two in zip(recorded, again, strict=True))
    assert not torch.equal(recorded[0], eager[0])


def summing(loaded: Library, rows: int, dtype: torch.dtype) -> list[MatmulPlan]:
    """Plans of torch's default and of each proposal of the library."""
    names = [kernel_name(loaded.version, algorithm) for algorithm in proposed(loaded, rows, dtype)]
    default = "cublas_fp8" if dtype == torch.float8_e4m3fn else "cublas"
    return [MatmulPlan("rows", ((None, name),)) for name in (default, *names)]


def summed(
    plan: MatmulPlan, x: torch.Tensor, w: torch.Tensor, scales: Scales | None, summand: torch.Tensor
) -> torch.Tensor:
    fused = plan.fused(len(x), N, AddAfter)
    assert fused is not None
    found = fused(x, w, None, scales, AddAfter(summand))
    assert found is not None and found.data_ptr() != summand.data_ptr()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [LEAST_ADDED_ROWS, 5003])
def test_a_sum_is_the_product_and_the_summand(rows: int, dtype: torch.dtype, loaded: Library) -> None:
    x, w, scales = operands(rows, dtype)
    factor = 1.0 if scales is None else float(scales.x * scales.w)
    exact = x.float() @ w.float().t() * factor
    out_dtype = dtype if scales is None else scales.out_dtype
    summand = (torch.randn_like(exact) * exact.std()).to(out_dtype)
    held, expected = summand.clone(), exact + summand.float()
    for plan in summing(loaded, rows, dtype):
        found = summed(plan, x, w, scales, summand)
        assert_near(found, expected.to(out_dtype))
        assert torch.equal(found, summed(plan, x, w, scales, summand)) and torch.equal(summand, held)
        separate = plan.run(x, w, N, None, scales) + summand
        assert (found.float() - expected).norm() <= 1.01 * (separate.float() - expected).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_graph_sums_the_same_bits(dtype: torch.dtype, loaded: Library) -> None:
    x, w, scales = operands(LEAST_ADDED_ROWS, dtype)
    summand = torch.randn(len(x), N, device="cuda").bfloat16()
    plans = summing(loaded, len(x), dtype)
    eager = [summed(plan, x, w, scales, summand) for plan in plans]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        recorded = [summed(plan, x, w, scales, summand) for plan in plans]
    graph.replay()
    assert all(map(torch.equal, recorded, eager))
    summand.neg_()
    graph.replay()
    assert all(map(torch.equal, recorded, [summed(plan, x, w, scales, summand) for plan in plans]))
    assert not torch.equal(recorded[0], eager[0])


def test_sums_that_are_left_to_others(loaded: Library) -> None:
    rows = LEAST_ADDED_ROWS
    x, w, _ = operands(rows, torch.bfloat16)
    summand, bias = torch.zeros(rows, N, device="cuda").bfloat16(), torch.zeros(N, device="cuda").bfloat16()
    for plan in summing(loaded, rows, torch.bfloat16):
        fused = plan.fused(rows, N, AddAfter)
        assert fused is not None
        assert fused(x, w, bias, None, AddAfter(summand)) is None
        assert fused(x, w, None, None, AddAfter(summand.float())) is None
        assert fused(x, w, None, None, AddAfter(summand.t().contiguous().t())) is None
        assert fused(x.float(), w.float(), None, None, AddAfter(summand.float())) is None


@pytest.mark.parametrize("per", ["row", "output"])
def test_sums_have_scales_of_whole_tensors(per: str, loaded: Library) -> None:
    x, w, scales = operands(LEAST_ADDED_ROWS, torch.float8_e4m3fn)
    assert scales is not None
    x_scale = torch.ones(len(x), 1, device="cuda") if per == "row" else scales.x
    w_scale = torch.ones(N, device="cuda") if per == "output" else scales.w
    summand = torch.zeros(len(x), N, device="cuda").bfloat16()
    for plan in summing(loaded, len(x), torch.float8_e4m3fn):
        fused = plan.fused(len(x), N, AddAfter)
        assert fused is not None
        assert fused(x, w, None, Scales(x_scale, w_scale, torch.bfloat16), AddAfter(summand)) is None


def test_streams_do_not_disturb_each_other(loaded: Library) -> None:
    kernels = kernels_of(loaded, torch.bfloat16)
    cases = [operands(m, torch.bfloat16, seed) for seed, m in enumerate((64, 200))]
    alone = [[kernel(x, w, N, None) for kernel in kernels] for x, w, _ in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    together: list[list[torch.Tensor]] = [[] for _ in cases]
    for _ in range(5):
        for kernel in kernels:
            for (x, w, _), stream, found in zip(cases, streams, together, strict=True):
                with torch.cuda.stream(stream):
                    found.append(kernel(x, w, N, None))
    torch.cuda.synchronize()
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(one, expected[index % len(kernels)]) for index, one in enumerate(found))


def test_an_engine_gives_the_same_tokens_again(
    tmp_path: Path, loaded: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"max_batch_size": 4, "max_num_tokens": 512, "max_seq_len": 120, "device": "cuda"}
    plain = build(LlamaForCausalLM.dummy(config(), "cuda"), BuildConfig(kernel_selection="default", **limits))
    monkeypatch.setattr(gpu_algorithms, "LEAST_NUMBERS", 1 << 20)
    monkeypatch.setattr(gpu_algorithms, "LEAST_GAIN", 0.0)  # the best proposal is taken, however fast torch's is
    monkeypatch.setattr(gpu_algorithms, "MOST_LOSS", 100.0)
    engine = build(LlamaForCausalLM.dummy(config(), "cuda"), BuildConfig(kernel_selection="timed", **limits))
    engine.save(tmp_path / "engine")
    kernels = {name for plan in engine.spec.plans.values() for _, name in plan["steps"]}
    assert any(name.startswith(f"cublaslt:{loaded.version}:") for name in kernels)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 4096, (length,), generator=generator).tolist() for length in (20, 70, 100)]

    def tokens(made: Engine) -> list[list[int]]:
        with executor_of(made) as executor:
            params = SamplingParams(max_tokens=16, ignore_eos=True)
            return [executor.generate(ids, params).outputs[0].token_ids for ids in prompts]

    first = tokens(engine)
    assert tokens(engine) == first and tokens(Engine.load(tmp_path / "engine")) == first
    for ours, expected in zip(prompt_logprobs(engine, prompts), prompt_logprobs(plain, prompts), strict=True):
        assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 0.15
