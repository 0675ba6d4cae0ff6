"""``lamella bench``: fixed prompt and output lengths, random token ids, greedy, end tokens ignored, no prefix reuse.

Tokens only: no tokenizer takes part. Times of a request come from the engine: TTFT is submission to first token
(queueing included), TPOT the mean time between tokens, latency submission to the end.
"""

from __future__ import annotations

import json
import random
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamella.cli.machine import GIB, machine, peak_memory_bytes, versions
from lamella.llm import LLM
from lamella.outputs import RequestOutput
from lamella_core.engine import BuildConfig
from lamella_core.errors import ConfigError
from lamella_executor import KvCacheConfig, SamplingParams

PERCENTILES = (50, 90, 95, 99)
SEED = 0


@dataclass(frozen=True)
class BenchPlan:
    """What to measure."""

    mode: str  # "throughput" | "latency"
    model: str
    load_format: str
    dtype: str
    isl: int  # prompt tokens
    osl: int  # generated tokens
    num_requests: int
    concurrency: int  # requests in flight
    warmup: int
    max_batch_size: int | None
    max_num_tokens: int | None
    kernel_selection: str | None = None  # "timed" | "default"; None: what `LLM` does


def run_bench(plan: BenchPlan, report_json: Path | None) -> dict[str, Any]:
    """Runs the benchmark, prints its tables and returns (and maybe writes) the report."""
    err = Console(stderr=True, highlight=False)
    if report_json is not None:
        _check_writable(report_json)
    start = time.perf_counter()
    with err.status(f"loading {escape(plan.model)}"):
        llm = _open(plan)
    with llm:
        load_s = time.perf_counter() - start
        prompts = _prompts(llm, plan, plan.warmup + plan.num_requests)
        with err.status("warming up"):
            _run(llm, prompts[: plan.warmup], plan)
        with err.status(f"running {plan.num_requests} requests"):
            start = time.perf_counter()
            outputs = _run(llm, prompts[plan.warmup :], plan)
            wall_s = time.perf_counter() - start
        report = {
            "plan": asdict(plan),
            "engine": _describe(llm),
            "machine": {**machine(), "torch_threads": _threads()},
            "versions": versions(),
            "load_s": load_s,
            "peak_memory_bytes": peak_memory_bytes(),
            "results": summarize(outputs, wall_s),
        }
    _print(Console(highlight=False), report)
    if report_json is not None:
        report_json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _check_writable(path: Path) -> None:
    """Raises ConfigError if the report could not be written, before minutes are spent on measuring.

    A file that was there keeps its content; none is left behind if there was none.
    """
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--report-json: the directory {path.absolute().parent} does not exist")
    existed = path.exists()
    try:
        path.open("a", encoding="utf-8").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--report-json: {path} cannot be written ({error.strerror}); choose another file") from error


def _open(plan: BenchPlan) -> LLM:
    return LLM(
        plan.model,
        skip_tokenizer_init=True,
        load_format=plan.load_format,
        dtype=plan.dtype,
        max_batch_size=plan.max_batch_size,
        max_num_tokens=plan.max_num_tokens,
        build_config=BuildConfig(kernel_selection=plan.kernel_selection) if plan.kernel_selection else None,
        kv_cache_config=KvCacheConfig(enable_block_reuse=False),
    )


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _describe(llm: LLM) -> dict[str, Any]:
    spec = llm.engine.spec
    model = spec.model
    return {
        "architecture": model.architecture,
        "num_hidden_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
        "build": spec.build.to_dict(),
    }


def _prompts(llm: LLM, plan: BenchPlan, count: int) -> list[list[int]]:
    generator = random.Random(SEED)
    vocab = llm.engine.spec.model.vocab_size
    return [[generator.randrange(vocab) for _ in range(plan.isl)] for _ in range(count)]


def _run(llm: LLM, prompts: list[list[int]], plan: BenchPlan) -> list[RequestOutput]:
    """Keeps ``plan.concurrency`` requests in flight; returns the outputs in order."""
    params = SamplingParams(max_tokens=plan.osl, ignore_eos=True)
    outputs: list[RequestOutput] = []
    waiting: deque[RequestOutput] = deque()
    for prompt in prompts:
        if len(waiting) >= plan.concurrency:
            _wait_for_one(waiting)
        outputs.append(llm.generate_async(prompt, params))
        waiting.append(outputs[-1])
    for output in waiting:
        output.result()
    short = [o for o in outputs if len(o.token_ids) != plan.osl]
    if short:
        raise ConfigError(
            f"isl {plan.isl} + osl {plan.osl} do not fit max_seq_len {llm.engine.spec.build.max_seq_len}; lower one"
        )
    return outputs


def _wait_for_one(waiting: deque[RequestOutput]) -> None:
    """Blocks until some request of ``waiting`` is done and removes the done ones."""
    while not any(output.finished for output in waiting):
        try:
            waiting[0].result(timeout=0.002)
        except TimeoutError:
            continue
    for output in [o for o in waiting if o.finished]:
        output.result()
        waiting.remove(output)


def summarize(outputs: list[RequestOutput], wall_s: float) -> dict[str, Any]:
    """Returns rates over the wall time, and mean and percentiles of each request's times, in seconds."""
    metrics = [o.metrics for o in outputs if o.metrics is not None]
    generated = sum(m.num_output_tokens for m in metrics)
    prompt = sum(m.num_prompt_tokens for m in metrics)
    return {
        "wall_s": wall_s,
        "num_requests": len(outputs),
        "request_throughput": len(outputs) / wall_s,
        "output_throughput": generated / wall_s,
        "total_throughput": (generated + prompt) / wall_s,
        "ttft_s": distribution([m.ttft_s for m in metrics if m.ttft_s is not None]),
        "tpot_s": distribution([m.itl_mean_s for m in metrics if m.itl_mean_s is not None]),
        "latency_s": distribution([m.e2e_s for m in metrics]),
    }


def distribution(values: list[float]) -> dict[str, float] | None:
    """Returns min, mean, max and the percentiles (linear interpolation); None without values."""
    if not values:
        return None
    ordered = sorted(values)
    result = {"min": ordered[0], "mean": sum(ordered) / len(ordered), "max": ordered[-1]}
    for percent in PERCENTILES:
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        result[f"p{percent}"] = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
    return result


def _print(out: Console, report: dict[str, Any]) -> None:
    results, plan, engine, host = (report[key] for key in ("results", "plan", "engine", "machine"))
    out.print(
        f"{engine['architecture']}, {engine['num_hidden_layers']} layers, hidden {engine['hidden_size']}, "
        f"{engine['dtype']}; {plan['num_requests']} requests of {plan['isl']} in, {plan['osl']} out, "
        f"{plan['concurrency']} in flight",
        markup=False,
        soft_wrap=True,
    )
    out.print(
        f"{host['cpu']}, {host['usable_cores']} cores, {host['torch_threads']} threads", markup=False, soft_wrap=True
    )
    names = ("lamella", "torch", "python")
    out.print(", ".join(f"{name} {report['versions'][name]}" for name in names))
    table = Table("metric", "value")
    table.add_row("output tokens/s", f"{results['output_throughput']:.1f}")
    table.add_row("total tokens/s", f"{results['total_throughput']:.1f}")
    table.add_row("requests/s", f"{results['request_throughput']:.3f}")
    table.add_row("wall time", f"{results['wall_s']:.2f} s")
    table.add_row("load time", f"{report['load_s']:.2f} s")
    table.add_row("peak memory", f"{report['peak_memory_bytes'] / GIB:.2f} GiB")
    out.print(table)
    times = Table("milliseconds", "mean", "min", *(f"P{p}" for p in PERCENTILES), "max")
    for key, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("latency_s", "latency")):
        values = results[key]
        if values is not None:
            keys = ("mean", "min", *(f"p{p}" for p in PERCENTILES), "max")
            times.add_row(label, *(f"{1000 * values[k]:.2f}" for k in keys))
    out.print(times)
