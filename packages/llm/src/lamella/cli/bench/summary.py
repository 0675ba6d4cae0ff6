"""From what was measured to the numbers that are reported; JSON-ready, times in seconds unless named otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lamella.cli.bench.plan import BenchPlan
from lamella.cli.bench.workload import Measured, time_per_output_token
from lamella.roofline import ModelShape, Roofline, find_hardware
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_executor.stats import IterationStats

PERCENTILES = (50, 90, 95, 99)


def summarize(measured: Measured, plan: BenchPlan) -> dict[str, Any]:
    """Returns rates over the wall time, and mean and percentiles of each request's times."""
    outputs, wall_s = measured.outputs, measured.wall_s
    metrics = [o.metrics for o in outputs if o.metrics is not None]
    generated = sum(m.num_output_tokens for m in metrics)
    prompt = sum(m.num_prompt_tokens for m in metrics)
    results: dict[str, Any] = {
        "wall_s": wall_s,
        "num_requests": len(outputs),
        "request_throughput": len(outputs) / wall_s,
        "output_throughput": generated / wall_s,
        "total_throughput": (generated + prompt) / wall_s,
        "ttft_s": distribution([m.ttft_s for m in metrics if m.ttft_s is not None]),
        "tpot_s": distribution([m.itl_mean_s for m in metrics if m.itl_mean_s is not None]),
        "latency_s": distribution([m.e2e_s for m in metrics]),
    }
    if measured.runs:
        results["runs"] = measured.runs
        results["time_per_output_token_s"] = time_per_output_token(measured.runs, plan.osl)
    return results


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


def summarize_steps(steps: Sequence[IterationStats], *, decode_only: bool = False) -> dict[str, Any] | None:
    """Returns how the engine's steps were filled and where the loop's time went; None without steps.

    ``forward`` is what the loop waited for the model, ``host`` scheduling, launching, sampling and updates, ``between``
    the time from the end of the step before. On a GPU the model runs beside the host; a trace says what it did. There
    ``host`` also has what launching waited for, when as much was launched as the device takes ahead. ``host_ms`` splits
    it: steps that decode only are mostly recorded ones, those with prompt tokens are launched kernel by kernel.

    Args:
        steps: consecutive, oldest first.
        decode_only: times are of the steps that computed no prompt tokens.
    """
    pairs = list(zip(steps, steps[1:]))
    if decode_only:
        pairs = [pair for pair in pairs if not pair[1].num_context_tokens]
    if not pairs:
        return None
    count = len(pairs)
    whole = sum(after.timestamp_s - before.timestamp_s for before, after in pairs)
    forward = sum(after.wait_s for _, after in pairs)
    busy = sum(after.latency_s for _, after in pairs)
    between = max(0.0, whole - busy)  # two clocks: the difference may come out below 0
    return {
        "num_steps": len(steps),
        "mean_running": statistics.fmean(s.num_running for s in steps),
        "median_running": statistics.median(s.num_running for s in steps),
        "most_running": max(s.num_running for s in steps),
        "mean_context_tokens": statistics.fmean(s.num_context_tokens for s in steps),
        "mean_generation_tokens": statistics.fmean(s.num_generation_tokens for s in steps),
        "num_paused": sum(s.num_paused for s in steps),
        "most_live_blocks": max(s.num_live_blocks for s in steps),
        "step_ms": 1e3 * (busy + between) / count,
        "parts_ms": {
            "forward": 1e3 * forward / count,
            "host": 1e3 * (busy - forward) / count,
            "between": 1e3 * between / count,
        },
        "host_ms": {
            "decode": _host_ms([s for _, s in pairs if not s.num_context_tokens]),
            "prompts": _host_ms([s for _, s in pairs if s.num_context_tokens]),
        },
    }


def _host_ms(steps: Sequence[IterationStats]) -> dict[str, float] | None:
    if not steps:
        return None
    return {"num_steps": len(steps), "median": 1e3 * statistics.median(s.latency_s - s.wait_s for s in steps)}


def typical_running(steps: Sequence[IterationStats]) -> int:
    """Returns how many requests ran at once in the middle of a run: while others waited for room, if some did."""
    running = [s.num_running for s in steps if s.num_queued] or [s.num_running for s in steps]
    return max(1, round(statistics.median(running))) if running else 0


def against_roofline(
    results: dict[str, Any], plan: BenchPlan, config: ModelConfig, gpu_name: str | None
) -> dict[str, Any] | None:
    """Returns what the GPU allows for this workload and which part of it was reached; None if that is not known.

    For N ranks it is what N times the memory, bandwidth and arithmetic rate allow, with links that take no time.
    """
    found = find_hardware(gpu_name) if gpu_name else None
    if found is None:
        return None
    hardware = found.times(config.mapping.world_size)
    try:
        roofline = Roofline(ModelShape.of(config), hardware)
        if plan.mode == "latency":
            bound = roofline.step(plan.concurrency, plan.isl + plan.osl / 2)
            reached = results["time_per_output_token_s"]
            parts = {"step_s": bound, "fraction": bound / reached if reached else None}
        else:
            most = plan.concurrency
            bound = roofline.serial(plan.isl, plan.osl, most)
            parts = {
                "serial_throughput": bound,
                "overlap_throughput": roofline.overlap(plan.isl, plan.osl, most),
                "concurrency": roofline.concurrency(plan.isl, plan.osl, most),
                "fraction": results["output_throughput"] / bound,
            }
    except ConfigError as error:
        return {"hardware": hardware.name, "unknown": str(error)}
    known = {"hardware": hardware.name, "num_gpus": hardware.count, "is_measured": hardware.is_measured}
    return {**known, **parts}
