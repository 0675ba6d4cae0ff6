"""Choosing cuBLASLt's algorithms per range of rows: which is taken, and when nothing is timed at all."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.fake_cublaslt import install

from lamella_builder import BuildConfig
from lamella_builder.steps import gpu_algorithms, gpu_timing, kernels
from lamella_builder.steps.gpu_algorithms import Refined, RowRange, Timer, choose_algorithms, refine, row_ranges
from lamella_builder.steps.kernels import Choice, Shape, recorded_choices
from lamella_core import disk_cache
from lamella_core.engine import Engine
from lamella_core.kernels.cublaslt import kernel_name
from lamella_core.kernels.matmul import MatmulPlan
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM

PLAN = MatmulPlan("rows", ((16, "triton_gemv"), (None, "cublas")))
A, B, C = (kernel_name(130100, bytes([index]) * 64) for index in range(3))
RANGES = [RowRange(17, 64), RowRange(65, 128), RowRange(129, 256)]  # 40, 96 and 192 rows lie in the middle
N, K = 4096, 1024


class Times:
    """Seconds by row count and kernel; 1 where nothing is said. ``asked`` are the row counts measured."""

    def __init__(self, seconds: dict[int, dict[str, float]]) -> None:
        self.seconds = seconds
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def __call__(self, rows: int, names: Sequence[str]) -> dict[str, float]:
        self.asked.append((rows, tuple(names)))
        return {name: self.seconds.get(rows, {}).get(name, 1.0) for name in names}


def chosen(times: dict[int, dict[str, float]], names: Sequence[str] = (A, B, C)) -> Any:
    refined = choose_algorithms(PLAN, RANGES, lambda rows: names, Times(times), 60.0)
    steps = refined.plan.steps
    assert steps[0] == (16, "triton_gemv") and steps[-1] == (None, "cublas") and refined.untimed is None
    return steps[1:-1], refined.gains


def test_ranges_of_rows() -> None:
    assert row_ranges(17, 256) == RANGES
    assert row_ranges(1, 100) == [RowRange(1, 64), RowRange(65, 100)]
    assert row_ranges(17, 17) == [RowRange(17, 17)] and row_ranges(65, 64) == []
    assert [span.last for span in row_ranges(17, 16384)] == [*gpu_algorithms.ROW_LIMITS, 16384]
    assert RowRange(385, 512) in row_ranges(17, 2048) and RowRange(385, 512).inside == 448


def test_the_fastest_is_taken_and_neighbours_are_merged() -> None:
    fast = {rows: {A: 0.9, B: 0.8} for rows in (40, 64, 96, 128)}
    steps, gains = chosen(fast)
    assert steps == ((128, B),) and gains == pytest.approx({64: 1.25, 128: 1.25})
    steps, _ = chosen({rows: {A: 0.9} for rows in (40, 64, 192, 256)})
    assert steps == ((64, A), (128, "cublas"), (256, A))
    assert chosen({rows: {A: 0.9} for span in RANGES for rows in (span.inside, span.last)})[0] == ((256, A),)


def test_an_algorithm_must_be_faster_in_all_and_slower_nowhere() -> None:
    assert chosen({64: {A: 0.99}, 40: {A: 0.985}}) == ((), {})  # 1.2 %
    assert chosen({64: {A: 1.05}, 40: {A: 0.5}}) == ((), {})
    assert chosen({64: {A: 0.5}, 40: {A: 1.05}}) == ((), {})
    steps, gains = chosen({64: {A: 1.0}, 40: {A: 0.7}})  # torch's choice is bad inside the range alone
    assert steps == ((64, A),) and gains == pytest.approx({64: 0.7**-0.5})


def test_a_kernel_that_fails_is_not_taken() -> None:
    assert chosen({64: {A: math.inf}, 40: {A: 0.5}}) == ((), {})
    assert chosen({64: {"cublas": math.inf, A: math.inf}, 128: {"cublas": math.inf}}) == ((), {})


def test_the_algorithm_of_fewer_rows_serves_on_where_it_is_as_good() -> None:
    times = {64: {A: 0.8}, 40: {A: 0.8}, 128: {A: 0.802, B: 0.8}, 96: {A: 0.802, B: 0.8}}
    assert chosen(times)[0] == ((128, A),)
    times |= {128: {A: 0.81, B: 0.8}, 96: {A: 0.81, B: 0.8}}
    assert chosen(times)[0] == ((64, A), (128, B))


def test_what_is_timed_is_bounded_and_what_is_slow_is_timed_once() -> None:
    names = [kernel_name(1, bytes([index]) * 64) for index in range(20)]
    times = Times({64: {name: 2.0 for name in names[3:]}})
    choose_algorithms(PLAN, RANGES[:1], lambda rows: names[:8] if rows == 64 else names[6:14], times, 60.0)
    (last, first), (inside, second) = times.asked
    assert (last, inside) == (64, 40)
    assert first == ("cublas", *(names[index] for index in (0, 6, 1, 7, 2, 8, 3, 9)))
    assert second == ("cublas", *(names[index] for index in (0, 1, 2)))


class Clock:
    """Time that stands still but for what timing takes: a second per range of rows."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def timer(self, times: Times) -> Timer:
        def timed(rows: int, names: Sequence[str]) -> dict[str, float]:
            self.now += 0.5
            return times(rows, names)

        return timed


def in_turns_of(seconds: float, times: Times, monkeypatch: pytest.MonkeyPatch) -> list[Refined]:
    """What one call after another finds, each going on where the one before ended."""
    clock, done = Clock(), [Refined(PLAN, untimed=17)]
    monkeypatch.setattr(gpu_algorithms, "time", clock)
    while (first := done[-1].untimed) is not None:
        ranges = row_ranges(first, 256)
        done.append(choose_algorithms(done[-1].plan, ranges, lambda rows: (A, B), clock.timer(times), seconds))
    return done[1:]


@pytest.mark.parametrize("fast", [{}, {64: A}, {128: A}, {256: A}, {64: A, 128: B, 256: A}, {64: A, 256: A}])
def test_time_runs_out_and_later_calls_go_on(fast: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    spans = {span.last: span for span in RANGES}
    times = Times({rows: {name: 0.5} for last, name in fast.items() for rows in (last, spans[last].inside)})
    whole, *others = in_turns_of(60.0, times, monkeypatch)
    assert not others
    num_asked = len(times.asked)
    parts = in_turns_of(0.9, times, monkeypatch)
    assert [part.untimed for part in parts] == [65, 129, None] and len(times.asked) == 2 * num_asked
    assert parts[-1].plan == whole.plan
    assert {last: gain for part in parts for last, gain in part.gains.items()} == whole.gains


def members(dtype: torch.dtype, n: int = N, **module: Any) -> list[Any]:
    """Weights without memory that say they are on a GPU."""
    weight = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(n, K))
    return [SimpleNamespace(weight=weight, is_stacked=False, module=SimpleNamespace(**module))]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Times:
    """A machine where the library's second algorithm is the fastest, and timing is that of `Times`."""
    monkeypatch.setattr(disk_cache, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(kernels, "gpu_environment", lambda: {"gpu": "one"})
    fake = install(monkeypatch)
    times = Times({})
    times.seconds = {rows: {kernel_name(130100, fake.algorithms[1]): 0.7} for rows in range(8192)}
    monkeypatch.setattr(gpu_algorithms, "GpuTimer", lambda weights, dtype: times)
    monkeypatch.setattr(
        kernels, "time_gpu_plans", lambda plans, rows, weights, dtype: [dict.fromkeys(rows, 1.0) for _ in plans]
    )
    return times


def limits(**changes: Any) -> BuildConfig:
    return BuildConfig(**{"dtype": "bfloat16", "device": "cuda", "max_batch_size": 32, "opt_num_tokens": 32, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_build_takes_algorithms(dtype: torch.dtype, timed: Times, caplog: pytest.LogCaptureFixture) -> None:
    shape = Shape(N, K, dtype, False)
    with caplog.at_level(logging.INFO):
        choice = kernels._choose(shape, members(dtype), limits(max_num_tokens=384))
    limit, name = choice.plan.steps[-2]
    assert limit == 384 and name.startswith("cublaslt:130100:")
    assert {rows for rows, _ in timed.asked} >= {64, 128, 256, 320, 384}
    assert "384 rows 42.9 %" in caplog.text
    output = kernels._choose(Shape(N, K, dtype, True), members(dtype), limits(max_num_tokens=384))
    assert output.plan.steps[-2] == (32, name)


@pytest.mark.parametrize("case", ["default", "small", "float32", "bias", "stacked", "few rows", "no library", "error"])
def test_when_nothing_is_refined(
    case: str, timed: Times, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    n = 3072 if case == "small" else N
    held = members(dtype, n, bias=object() if case == "bias" else None)
    build = limits(kernel_selection="default" if case == "default" else "timed")
    if case == "few rows":
        build = limits(max_num_tokens=16)
    if case == "stacked":
        held[0].is_stacked = True
    if case == "no library":
        monkeypatch.setattr(gpu_algorithms.cublaslt_library, "library", lambda: None)
    if case == "error":
        monkeypatch.setattr(gpu_algorithms, "GpuTimer", lambda *_: (_ for _ in ()).throw(RuntimeError("out of it")))
    choice = kernels._choose(Shape(n, K, dtype, False), held, build)
    assert not any("cublaslt" in name for _, name in choice.plan.steps) and not timed.asked
    assert ("out of it" in caplog.text) == (case == "error")
    is_kept = bool(list(disk_cache.cache_root().rglob("*.json")))
    assert is_kept == (case in ("small", "float32", "bias", "few rows", "no library"))


def test_algorithms_are_taken_over_by_later_builds(timed: Times) -> None:
    shape = Shape(N, K, torch.bfloat16, False)
    first = kernels._choose(shape, members(torch.bfloat16), limits())
    num_asked = len(timed.asked)
    assert kernels._choose(shape, members(torch.bfloat16), limits()).plan == first.plan
    assert any("cublaslt" in name for _, name in first.plan.steps) and len(timed.asked) == num_asked
    kernels._choose(shape, members(torch.bfloat16, bias=object()), limits())
    kernels._choose(shape, members(torch.bfloat16), limits(max_num_tokens=1024))
    assert len(timed.asked) > num_asked


def test_later_builds_go_on_where_time_ran_out(timed: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, build = Shape(N, K, torch.bfloat16, False), limits(max_num_tokens=128)
    monkeypatch.setattr(gpu_algorithms, "SECONDS_PER_SHAPE", -1.0)
    first = kernels._choose(shape, members(torch.bfloat16), build)
    assert first.untimed == 17 and not first.has_failed and not timed.asked
    monkeypatch.setattr(gpu_algorithms, "SECONDS_PER_SHAPE", 60.0)
    second = kernels._choose(shape, members(torch.bfloat16), build)
    assert [rows for rows, _ in timed.asked] == [64, 40, 128, 96] and second.untimed is None
    assert any("cublaslt" in name for _, name in second.plan.steps)
    assert kernels._choose(shape, members(torch.bfloat16), build) == replace(second, milliseconds=())
    assert len(timed.asked) == 4


@pytest.mark.parametrize("untimed", ["missing", "64", True, 1.5])
def test_damaged_files_are_made_again(untimed: object, timed: Times, caplog: pytest.LogCaptureFixture) -> None:
    shape = Shape(N, K, torch.bfloat16, False)
    first = kernels._choose(shape, members(torch.bfloat16), limits())
    (path,) = disk_cache.cache_root().rglob("*.json")
    record = json.loads(path.read_text())
    record["untimed"] = untimed
    if untimed == "missing":
        del record["untimed"]
    path.write_text(json.dumps(record))
    num_asked = len(timed.asked)
    assert kernels._choose(shape, members(torch.bfloat16), limits()).plan == first.plan
    assert "is damaged" in caplog.text and len(timed.asked) == 2 * num_asked
    assert json.loads(path.read_text())["untimed"] is None


def test_other_ranks_take_the_choice_over(timed: Times) -> None:
    shape = Shape(N, K, torch.bfloat16, False)
    choice = kernels._choose(shape, members(torch.bfloat16), limits())
    model = LlamaForCausalLM(
        LlamaConfig(
            architecture="LlamaForCausalLM", model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=32,
            max_position_embeddings=32, dtype="bfloat16",
        )
    )  # fmt: skip
    records = (json.loads(json.dumps(choice.to_dict())),)
    known = recorded_choices(Engine.from_model(model, timings=records).spec)
    assert known == {shape: Choice(shape, choice.plan, 1)}
    assert any("cublaslt" in name for _, name in known[shape].plan.steps)


def test_rows_that_the_library_cannot_serve(timed: Times) -> None:
    plan = MatmulPlan("rows", ((None, "torch_fp8_upcast"),))
    assert refine(plan, 64, [members(torch.float8_e4m3fn)[0].weight], torch.bfloat16, N, K) == Refined(plan)
    odd = members(torch.bfloat16, 4100)[0].weight
    assert refine(PLAN, 64, [odd], torch.bfloat16, 4100, K) == Refined(PLAN)


def test_kernels_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seconds = {"cublas": 8e-3, "torch_fp8_upcast": 4e-3, "cublas_fp8": 9e-3}
    replays: list[tuple[str, int]] = []

    def record(run: Any, launches: int, stream: Any, pool: Any) -> str:
        name = run.args[0].name
        assert launches == 8 and run.args[1].shape == (64, 16) and next(run.args[2]).shape == (32, 16)
        if name == "triton_gemv":
            raise RuntimeError("too many rows\nfor it")
        return name

    def replay(graph: str, times: int) -> float:
        replays.append((graph, times))
        return seconds[graph] * (1.0 if len(replays) > 6 else 1.05)  # the first ones are slower

    monkeypatch.setattr(gpu_timing, "record", record)
    monkeypatch.setattr(gpu_timing, "_replay", replay)
    for name in ("Stream", "graph_pool_handle", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    timer = gpu_timing.GpuTimer([torch.zeros(32, 16, dtype=torch.bfloat16)], torch.bfloat16)
    found = timer(64, ["cublas", "triton_gemv", "torch_fp8_upcast", "cublas_fp8"])
    assert found == pytest.approx(
        {"cublas": 1e-3, "triton_gemv": math.inf, "torch_fp8_upcast": 5e-4, "cublas_fp8": 9e-3 * 1.05 / 8}
    )
    assert replays[6:] == [("cublas", 1), ("torch_fp8_upcast", 1)] * 3  # torch's choice always; the slow one no more
    assert "triton_gemv is left out: too many rows" in caplog.text
