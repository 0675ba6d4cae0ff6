"""Traces become shares of a step: kinds by kernel name, every moment counted once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lamella.cli.bench.kernels import (
    ATTENTION,
    COPY,
    GEMM,
    GLUE,
    KINDS,
    LINKS,
    OTHER,
    SAMPLING,
    GpuEvent,
    attribute,
    breakdown,
    classify,
    clip,
    count_launches,
    read_trace,
)

KERNELS = Path(__file__).resolve().parents[3] / "packages/core/src/lamella_core/kernels"
TRITON = KERNELS / "triton"

NAMES = {
    "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT": GEMM,
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_execute_kernel": GEMM,
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>>>": GEMM,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": GEMM,
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float>": GEMM,
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn": GEMM,
    "kernel_mha": ATTENTION,
    "void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<...>>": ATTENTION,
    "void flashinfer::BatchDecodeWithPagedKVCacheKernel<...>": ATTENTION,
    "void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, 16u>": ATTENTION,
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>": ATTENTION,
    "void pytorch_flash::flash_fwd_kernel<...>": ATTENTION,
    "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>": GLUE,
    "void flashinfer::RopeQuantizeAppendPagedKVCacheKernel<...>": GLUE,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": GLUE,
    "void at::native::(anonymous namespace)::indexSelectLargeIndex<...>": GLUE,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>": SAMPLING,
    "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<...>": SAMPLING,
    "void my_own_thing(float*)": OTHER,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_library_kernels(name):
    assert classify(GpuEvent(name, 0, 1)) == NAMES[name]


def triton_kernels() -> list[tuple[str, str]]:
    """(file below the Triton folder, kernel) of every launchable kernel; helpers that kernels call do not end so."""
    found = []
    for path in sorted(TRITON.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.append((path.relative_to(TRITON).as_posix(), node.name))
    return found


def test_our_own_kernels_are_known():
    kernels = triton_kernels()
    assert len(kernels) > 5
    for file, name in kernels:
        if file.startswith("attention/") or file in ("state_space.py", "delta_rule.py"):  # what mixes tokens
            expected = ATTENTION
        elif name.endswith("product_kernel"):
            expected = GEMM
        elif file.startswith("all_reduce"):
            expected = LINKS
        else:
            expected = {"gemv_kernels.py": GEMM}.get(file, SAMPLING if file.startswith("sampling") else GLUE)
        assert classify(GpuEvent(name, 0, 1)) == expected, f"{file}:{name}"


def test_our_own_kernels_in_cuda_are_known():
    known = {"gated_product": GEMM, "prompt_attention": ATTENTION}
    sources = list(KERNELS.glob("cuda/*.cu"))
    assert {source.stem for source in sources} == set(known)
    for source in sources:
        (name,) = re.findall(r'extern "C" __global__[^{]*?(\w+)\(const __grid', source.read_text())
        assert classify(GpuEvent(name, 0, 1)) == known[source.stem]


def test_every_moment_counts_once():
    events = [
        GpuEvent("gemm_a", 0, 10),
        GpuEvent("rms_norm", 8, 14),  # launched early: it waits until 10
        GpuEvent("Memcpy HtoD", 12, 18, is_copy=True),  # beside the norm until 14
        GpuEvent("attention", 20, 30),
        GpuEvent("silu", 22, 25),  # entirely beside the attention
    ]
    own, idle = attribute(events)
    assert own == [10, 4, 4, 10, 0]
    assert idle == 2
    assert sum(own) + idle == 30


def test_a_copy_in_several_gaps():
    events = [
        GpuEvent("Memcpy", 0, 20, is_copy=True),
        GpuEvent("a", 5, 8),
        GpuEvent("b", 10, 12),
        GpuEvent("Memset", 15, 25, is_copy=True),
    ]
    own, idle = attribute(events)
    assert own == [15, 3, 2, 5]
    assert idle == 0


def test_nothing_at_all():
    assert attribute([]) == ([], 0)
    assert clip([], 5) == []


def test_clip_cuts_what_crosses_the_end():
    events = [GpuEvent("a", 100, 104), GpuEvent("b", 108, 120), GpuEvent("c", 111, 112)]
    assert clip(events, 10) == [GpuEvent("a", 100, 104), GpuEvent("b", 108, 110)]


def recorded_trace() -> dict:
    """Two steps of 1000 microseconds as the profiler writes them, entries of the host among them."""

    def kernel(name: str, ts: float, dur: float) -> dict:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 7}

    events: list[dict] = [{"ph": "M", "name": "process_name", "pid": 0}]
    for start in (5000.0, 6000.0):
        events += [
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": start - 50, "dur": 900, "pid": 1},
            kernel("_silu_and_mul_kernel", start + 500, 100),
            kernel("nvjet_hsh_128x256", start, 500),
            kernel("kernel_mha", start + 600, 200),
            {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": start + 800, "dur": 50, "pid": 0},
            kernel("sample_kernel", start + 850, 50),
        ]
    return {"traceEvents": events}


def test_breakdown_of_a_recorded_trace():
    events = read_trace(recorded_trace())
    assert [event.start for event in events] == sorted(event.start for event in events)
    assert len(events) == 10 and sum(event.is_copy for event in events) == 2
    found = breakdown(events, num_steps=2, num_top=2)
    parts = found["parts_ms"]
    assert set(parts) == {*KINDS, "idle"}
    expected = {GEMM: 0.5, GLUE: 0.1, ATTENTION: 0.2, COPY: 0.05, SAMPLING: 0.05, LINKS: 0.0, OTHER: 0.0, "idle": 0.05}
    assert parts == pytest.approx(expected)  # after the last kernel of the second step nothing is known
    assert sum(parts.values()) == pytest.approx(found["step_ms"]) == pytest.approx(0.95)
    assert found["num_kernels_per_step"] == 4
    assert [(k["name"], k["kind"]) for k in found["kernels"]] == [
        ("nvjet_hsh_128x256", GEMM),
        ("kernel_mha", ATTENTION),
    ]
    assert found["kernels"][0]["ms"] == pytest.approx(0.5) and found["kernels"][0]["calls"] == 1


def call(category: str, name: str, correlation: int, ts: float, dur: float = 5.0, tid: int = 1) -> dict:
    arguments = {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": arguments}


def test_launches_without_a_kernel_are_counted():
    events = [
        call("cuda_runtime", "cudaLaunchKernel", 1, 0),
        call("cuda_driver", "cuLaunchKernelEx", 2, 10),
        call("cuda_runtime", "cudaGraphLaunch", 3, 20),
        call("cuda_runtime", "cudaMemcpyAsync", 4, 30),
        call("cuda_runtime", "cudaLaunchKernelExC", 5, 40),
        call("kernel", "gemm", 1, 100, tid=7),
        call("kernel", "of_a_graph", 3, 110, tid=7),
        call("kernel", "of_a_graph", 3, 120, tid=7),
        call("gpu_memcpy", "Memcpy", 4, 130, tid=7),
        {"ph": "M", "name": "process_name"},
    ]
    assert count_launches({"traceEvents": events}) == (4, 2)
    assert count_launches({"traceEvents": events[-2:]}) == (0, 0)
    assert count_launches(recorded_trace()) == (0, 0)  # without numbers nothing is known


@pytest.mark.parametrize("ran", [10, 11])
def test_a_launch_by_the_driver_within_one_by_the_runtime_is_the_same(ran):
    events = [
        call("cuda_runtime", "cudaLaunchKernelExC", 10, 0, 9.0),
        call("cuda_driver", "cuLaunchKernelEx", 11, 2, 3.0),
        call("cuda_driver", "cuLaunchKernelEx", 12, 1, 3.0, tid=2),  # by another thread
        call("kernel", "gemm", ran, 50, tid=7),
    ]
    assert count_launches({"traceEvents": events}) == (2, 1)
