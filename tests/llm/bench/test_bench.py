"""What `lamella bench` asks for, measures and reports, on the CPU and with a GPU pretended."""

from __future__ import annotations

import json
import logging
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.tiny_models import write_config
from typer.testing import CliRunner

from lamella.cli import main as cli
from lamella.cli.bench import environment, plan, run, steady
from lamella.cli.bench.plan import BenchPlan
from lamella.cli.bench.summary import against_roofline, summarize_steps, typical_running
from lamella.cli.bench.workload import random_prompts, time_per_output_token
from lamella.roofline import ModelShape, Roofline, find_hardware
from lamella_core import AutoConfig
from lamella_core.errors import ConfigError, LamellaError
from lamella_core.quantization.config import QuantConfig
from lamella_executor.loop import EngineLoop
from lamella_executor.stats import IterationStats

LLAMA_8B = Path(__file__).resolve().parents[3] / "benchmarks" / "configs" / "llama-3.1-8b"
H100 = "NVIDIA H100 80GB HBM3"


def make_plan(**changes) -> BenchPlan:
    fields = dict(mode="throughput", model="m", load_format="dummy", dtype="bfloat16", isl=8, osl=6, num_requests=4,
                  concurrency=4, config_only=True, device="cpu")  # fmt: skip
    return BenchPlan(**{**fields, **changes})


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, ["bench", *(str(a) for a in arguments)])


def test_throughput_in_the_words_of_other_tools(config_dir, tmp_path):
    path = tmp_path / "report.json"
    done = invoke(
        "throughput", "--hf_config", config_dir, "--load-format", "dummy", "--input-len", 8, "--output_len", 8,
        "--num-prompts", 4, "--concurrency", -1, "--device", "cpu", "--json", path, "--seed", 3,
        "--scheduler_policy", "guaranteed_no_evict", "--log_level", "info",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["plan"]["concurrency"] == 4
    assert report["engine"]["build"]["max_seq_len"] == 16
    assert report["start_s"] > report["load_s"] > 0
    assert report["roofline"] is None and report["gpu"] is None  # of a CPU nothing is known
    assert report["steps"]["num_steps"] >= 8 and report["steps"]["most_running"] <= 4
    parts = report["breakdown"]["parts_ms"]
    assert set(parts) == {"forward", "host", "between"} and parts["forward"] > 0
    assert sum(parts.values()) == pytest.approx(report["breakdown"]["step_ms"])
    assert "KV cache" in done.stderr and not logging.getLogger("lamella_executor").handlers
    for word in ("start to first token", "forward", "scheduling", "between steps"):
        assert word in done.stdout


def test_latency_is_the_median_of_differences(config_dir, tmp_path):
    path = tmp_path / "report.json"
    done = invoke(
        "latency", "--hf-config", config_dir, "--load-format", "dummy", "--isl", 8, "--osl", 5, "--batch-size", 3,
        "--num-iters", 3, "--device", "cpu", "--report_json", path, "--no-breakdown",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(path.read_text())
    results = report["results"]
    assert report["breakdown"] is None and "time per output token" in done.stdout
    assert len(results["runs"]) == 3 and results["num_requests"] == 9
    each = sorted((r["whole_s"] - r["first_token_s"]) / 4 for r in results["runs"])
    assert results["time_per_output_token_s"] == pytest.approx(each[1])
    assert results["output_throughput"] == pytest.approx(45 / sum(r["whole_s"] for r in results["runs"]))
    assert report["engine"]["build"]["max_batch_size"] == 3


def test_one_token_has_no_time_per_output_token():
    assert time_per_output_token([{"whole_s": 1.0, "first_token_s": 0.5}], 1) is None


def test_defaults_follow_the_device(monkeypatch):
    on_cpu = make_plan().resolved()
    assert (on_cpu.device, on_cpu.max_batch_size, on_cpu.max_num_tokens) == ("cpu", None, None)
    assert (on_cpu.kernel_selection, on_cpu.warmup, on_cpu.max_seq_len) == ("default", 1, 14)
    monkeypatch.setattr(plan, "resolve_device", lambda name: "cuda")
    on_gpu = make_plan(device="auto", num_requests=6000, concurrency=6000).resolved()
    assert (on_gpu.device, on_gpu.max_batch_size, on_gpu.max_num_tokens) == ("cuda", 2048, 8192)
    assert (on_gpu.kernel_selection, on_gpu.warmup) == ("timed", 256)
    few = make_plan(concurrency=7, max_num_tokens=99, warmup=0, config_only=False).resolved()
    assert (few.max_batch_size, few.max_num_tokens, few.warmup, few.max_seq_len) == (7, 99, 0, None)


def test_an_engine_keeps_its_limits(tmp_path):
    (tmp_path / "engine.json").write_text("{}")
    kept = make_plan(model=str(tmp_path), device="auto").resolved()
    assert (kept.max_batch_size, kept.kernel_selection, kept.device, kept.warmup) == (None, None, "auto", 1)


@pytest.mark.parametrize(("field", "value"), [("quant", "fp9"), ("kv_cache_dtype", "int3")])
def test_unknown_schemes_are_refused_before_loading(field, value):
    with pytest.raises(ConfigError, match=f"(?i){value}"):
        make_plan(**{field: value}).resolved()


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_requests_longer_than_max_seq_len_are_refused_before_loading(config_dir, monkeypatch, mode):
    monkeypatch.setattr(BenchPlan, "open", lambda self: pytest.fail("the model was opened"))
    done = invoke(
        mode, "--hf-config", config_dir, "--load-format", "dummy", "--isl", 16, "--osl", 8, "--max-seq-len", 20
    )
    message = str(done.exception)
    assert isinstance(done.exception, ConfigError)
    assert "isl 16 + osl 8 = 24" in message and "max_seq_len 20" in message and "raise --max-seq-len" in message


def test_requests_longer_than_the_model_allows_are_refused_before_any_runs(config_dir, monkeypatch):
    monkeypatch.setattr(run, "first_token", lambda llm, plan: pytest.fail("a request ran"))
    done = invoke("throughput", "--model", config_dir, "--load-format", "dummy", "--isl", 60, "--osl", 8)
    assert isinstance(done.exception, ConfigError)
    assert "isl 60 + osl 8 = 68 tokens do not fit max_seq_len 64; lower --isl or --osl" in str(done.exception)


def test_requests_that_fill_max_seq_len_fit(tmp_path):
    assert make_plan(isl=16, osl=8, max_seq_len=24).resolved().max_seq_len == 24
    (tmp_path / "engine.json").write_text("{}")
    engine = make_plan(model=str(tmp_path), isl=16, osl=8).resolved()
    engine.check_fits(24)
    with pytest.raises(ConfigError, match="max_seq_len 23; .* build the engine"):
        engine.check_fits(23)


def test_schemes_reach_the_model(config_dir, tmp_path):
    path = tmp_path / "report.json"
    done = invoke(
        "throughput", "--hf-config", config_dir, "--load-format", "dummy", "--isl", 4, "--osl", 2, "--num-requests", 2,
        "--dtype", "bfloat16", "--quantization", "fp8", "--kv-cache-dtype", "fp8", "--device", "cpu", "--json", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    engine = json.loads(path.read_text())["engine"]
    assert (engine["quant_algo"], engine["kv_cache_quant_algo"]) == ("FP8", "FP8")
    assert "quantized FP8, FP8" in done.stdout


def test_prompts_repeat_by_seed_only():
    prompts = random_prompts(50, 9, 3, seed=1)
    assert prompts == random_prompts(50, 9, 3, seed=1) != random_prompts(50, 9, 3, seed=2)
    assert [len(p) for p in prompts] == [9, 9, 9] and all(0 <= t < 50 for p in prompts for t in p)


def stats(iteration: int, end: float, latency: float, forward: float, context: int = 0) -> IterationStats:
    return IterationStats(
        iteration=iteration, timestamp_s=end, latency_s=latency, forward_s=2 * latency, wait_s=forward, num_queued=0,
        num_running=iteration, num_paused=0, num_context_tokens=context, num_generation_tokens=iteration,
        num_live_blocks=2, num_cached_blocks=0, num_free_blocks=0,
    )  # fmt: skip


def test_parts_of_the_loop():
    steps = [
        stats(1, 10.0, 1.0, 0.5, 64),
        stats(2, 10.5, 0.4, 0.3),
        stats(3, 11.5, 0.8, 0.7, 64),
        stats(4, 12, 0.5, 0.4),
    ]
    found = summarize_steps(steps)
    assert found["step_ms"] == pytest.approx(2000 / 3)
    assert found["parts_ms"] == pytest.approx({"forward": 1400 / 3, "host": 300 / 3, "between": 300 / 3})
    assert (found["num_steps"], found["mean_running"], found["most_running"]) == (4, 2.5, 4)
    decode, prompts = (found["host_ms"][name] for name in ("decode", "prompts"))
    assert decode == {"num_steps": 2, "median": pytest.approx(100)}
    assert prompts == {"num_steps": 1, "median": pytest.approx(100)}
    decoding = summarize_steps(steps, decode_only=True)
    assert decoding["parts_ms"] == pytest.approx({"forward": 350, "host": 100, "between": 50})
    assert decoding["host_ms"]["prompts"] is None
    assert summarize_steps(steps[:1]) is None


def test_how_many_run_is_taken_while_others_wait():
    steps = [replace(stats(1, 1.0, 1.0, 0.5), num_running=n, num_queued=q) for n, q in ((9, 4), (7, 1), (2, 0), (1, 0))]
    assert typical_running(steps) == 8
    assert typical_running([*steps[2:], replace(steps[3], num_running=3)]) == 2
    assert typical_running([]) == 0


def test_fraction_of_the_roofline():
    config = replace(AutoConfig.from_hugging_face(LLAMA_8B), quantization=QuantConfig("FP8", "FP8"))
    roofline = Roofline(ModelShape.of(config), find_hardware(H100))
    workload = make_plan(isl=1000, osl=1000, concurrency=2000)
    found = against_roofline({"output_throughput": 16_500.0}, workload, config, H100)
    assert found["fraction"] == pytest.approx(16_500 / 18_821, rel=1e-4)
    assert found["concurrency"] == pytest.approx(roofline.concurrency(1000, 1000))
    alone = make_plan(mode="latency", isl=128, osl=128, concurrency=1)
    found = against_roofline({"time_per_output_token_s": 3.1e-3}, alone, config, H100)
    assert found["fraction"] == pytest.approx(2.68 / 3.1, rel=1e-2)
    assert against_roofline({}, alone, config, "NVIDIA T4") is None
    whole = replace(config, dtype="float32")
    assert "float32" in against_roofline({}, workload, whole, H100)["unknown"]


def test_requests_in_mid_life():
    lengths = steady.staggered(100, 40, 80)
    assert all(isl + osl == 140 and osl >= 1 for isl, osl in lengths)
    assert lengths[0] == (100, 40) and lengths[-1] == (139, 1)
    assert [isl for isl, _ in lengths] == sorted(isl for isl, _ in lengths)
    assert steady.staggered(8, 6, 1) == [(8, 6)]


@pytest.fixture
def traced(config_dir, monkeypatch):
    """Lets the profiler's session be a list of kernels of 100 microseconds each."""

    @contextmanager
    def session():
        yield "session"

    events = [{"ph": "X", "cat": "kernel", "name": "gemm", "ts": 100 * i, "dur": 90} for i in range(400_000)]
    monkeypatch.setattr(steady, "_profiler", session)
    monkeypatch.setattr(steady, "_trace", lambda found: {"traceEvents": events})
    monkeypatch.setattr(steady, "NUM_STEPS", 4)
    return make_plan(model=str(config_dir), dtype="float32", isl=6, osl=20).resolved()


def test_steps_are_traced_under_a_load_that_ends(traced, monkeypatch):
    plain = EngineLoop.step

    def slow(loop):  # so that requests live far longer than it takes to replace one
        time.sleep(0.01)
        plain(loop)

    monkeypatch.setattr(EngineLoop, "step", slow)
    monkeypatch.setattr(steady, "NUM_STEPS", 40)  # twice as many as the first requests live
    with traced.open() as llm:
        found = steady.profile_steps(llm, traced, num_running=3)
        assert llm.generate([1, 2, 3]).finished
        assert llm.get_stats()[-1].num_running <= 1
    assert found["num_steps"] == 40 and 2 <= found["num_running"] <= 3  # those that end are replaced, and no more
    assert found["parts_ms"]["idle"] == pytest.approx(0.1 * found["step_ms"], rel=0.1)
    assert found["parts_ms"]["GEMM"] == pytest.approx(0.9 * found["step_ms"], rel=0.1)


def test_a_trace_without_kernels_is_said_and_loses_nothing(traced, monkeypatch):
    monkeypatch.setattr(steady, "_trace", lambda found: {"traceEvents": []})
    report = {"gpu": {"name": "some GPU"}}
    with traced.open() as llm:
        with pytest.raises(LamellaError, match="no kernel"):
            steady.profile_steps(llm, traced, num_running=2)
        assert "no kernel" in run._breakdown(llm, traced, 2, report)["error"]


def launches(num_lost: int) -> list[dict]:
    """20 steps of 5 launches, the kernels of the first ``num_lost`` launches missing; copies are all there."""
    found = []
    for i in range(100):
        common = {"ph": "X", "ts": 1000 * i, "dur": 900, "args": {"correlation": i}}
        found.append({**common, "cat": "cuda_driver", "name": "cuLaunchKernelEx", "dur": 5, "tid": 1})
        found.append({**common, "cat": "gpu_memset", "name": "Memset (Device)", "dur": 1})
        if i >= num_lost:
            found.append({**common, "cat": "kernel", "name": "gemm"})
    return found


def test_kernels_that_the_profiler_lost_are_said_instead_of_a_gap(traced, monkeypatch):
    monkeypatch.setattr(steady, "_trace", lambda found: {"traceEvents": launches(99)})
    with traced.open() as llm:
        error = run._breakdown(llm, traced, 2, {"gpu": {"name": "some GPU"}})["error"]
    assert "lost the kernels of 99 of 100 launches" in error


def test_lost_kernels_are_tried_again_and_a_few_do_not_matter(traced, monkeypatch):
    traces = [launches(60), launches(8)]
    monkeypatch.setattr(steady, "_trace", lambda found: {"traceEvents": traces.pop(0)})
    with traced.open() as llm:
        found = steady.profile_steps(llm, traced, num_running=2)
    assert found["num_steps"] == 4 and not traces


def test_commit_of_a_checkout(monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    assert environment.commit() is None
    answers = {"rev-parse": "abc123\n", "ls-files": "__init__.py\n", "status": " M x\n"}
    monkeypatch.setattr(environment, "_output", lambda *command: answers[command[3]])
    assert environment.commit() == "abc123+"
    answers["ls-files"] = ""  # installed into an environment inside another project's checkout
    assert environment.commit() is None


def test_the_gpu_is_named(monkeypatch):
    facts = {"name": H100, "capability": "9.0", "memory_bytes": 1, "driver": "570.1", "cuda": "13.0", "triton": ""}
    monkeypatch.setattr(environment, "gpu_fingerprint", lambda: facts)
    found = environment.environment("cuda")
    assert (found["gpu"]["name"], found["gpu"]["capability"]) == (H100, "9.0")
    assert (found["versions"]["driver"], found["versions"]["triton"]) == ("570.1", None)
    assert {"flashinfer", "torch"} <= found["versions"].keys()
