"""From a GPU trace to the shares of a step: which kind of work each kernel is, and what nobody computed in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

GEMM, ATTENTION, GLUE, SAMPLING, COPY, OTHER = "GEMM", "attention", "glue", "sampling", "copies", "other"
LINKS = "messages"  # between ranks
KINDS = (GEMM, ATTENTION, GLUE, SAMPLING, LINKS, COPY, OTHER)

# The first that is found in the kernel's name decides. Rotary and cache writes come before attention, whose words are
# in their names too; attention before GEMM, for its kernels are built on the same matrix libraries.
_PATTERNS = (
    (GLUE, r"^_?top_k_kernel"),  # of a mixture's router, not of tokens
    (LINKS, r"nccl|all_?reduce|all_?gather|one_shot|two_shot|sum_norm_kernel"),
    (
        SAMPLING,
        r"sampl|argmax|top_?k|top_?p|min_?p_|multinomial|gumbel|philox|^_?(greedy|histogram|thresholds|masses|draw)_",
    ),
    (GLUE, r"rope|rotary|append_?paged|reshape_and_cache|write_kv|rms_?norm|layer_?norm|silu|act_and_mul|quant"),
    (
        ATTENTION,
        r"attention|attn|mha|xqa|flash_?fwd|flash::|kvcache_?kernel|gather_keys|merge_?states?"
        r"|^_?(decode|prefill|split|merge|combine|latent|join|conv|scan|chunk_scan|delta_rule)_",
    ),
    (
        GEMM,
        r"gemm|gemv|matmul|nvjet|cutlass|split_?k_?reduce|scaled_mm|wgmma|xmma|cublas|gated_product"
        r"|^_?(vector|matrix|(sorted_)?product)_kernel",
    ),
    (
        GLUE,
        r"^_?(count|place|spread|(sorted_)?sum)_kernel|norm|gelu|embed|gather|scatter|index|elementwise|reduce|cat_?array|copy|fill|prepare|update|cast|triton_",
    ),
)
_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
_COMPILED = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)


@dataclass(frozen=True)
class GpuEvent:
    """One kernel or copy on the GPU; times in microseconds of one clock."""

    name: str
    start: float
    end: float
    is_copy: bool = False  # done by the copy engines, beside kernels


def classify(event: GpuEvent) -> str:
    """Returns which of `KINDS` an event is, by its name."""
    if event.is_copy:
        return COPY
    return next((kind for kind, pattern in _COMPILED if pattern.search(event.name)), OTHER)


def read_trace(trace: dict[str, Any]) -> list[GpuEvent]:
    """Returns the GPU's events of a Chrome trace as `torch.profiler` writes it, by start."""
    categories = {"kernel": False, "gpu_memcpy": True, "gpu_memset": True}
    events = [
        GpuEvent(e["name"], float(e["ts"]), float(e["ts"]) + float(e.get("dur", 0)), categories[e["cat"]])
        for e in trace.get("traceEvents", [])
        if e.get("ph") == "X" and e.get("cat") in categories
    ]
    return sorted(events, key=lambda event: event.start)


def count_launches(trace: dict[str, Any]) -> tuple[int, int]:
    """Returns how many launches of kernels and graphs the host made, and how many of them the GPU has no kernel of.

    The tracing library gives both sides of a launch one correlation number. It may lose the GPU's side and keep that of
    the host, and of copies. The runtime's launch may contain one of the driver: these are one.
    """
    calls = [e for e in trace.get("traceEvents", []) if e.get("ph") == "X" and "correlation" in e.get("args", {})]
    ran = {e["args"]["correlation"] for e in calls if e.get("cat") == "kernel"}
    launches = [e for e in calls if e.get("cat") in ("cuda_runtime", "cuda_driver") and _LAUNCH.match(e["name"])]
    launches.sort(key=lambda e: (str(e.get("tid")), float(e["ts"]), -float(e.get("dur", 0))))
    number = missing = 0
    thread, end, is_missing = None, 0.0, False
    for launch in launches:
        found = launch["args"]["correlation"] in ran
        if launch.get("tid") == thread and float(launch["ts"]) < end:  # within the one before
            missing -= is_missing and found
            is_missing = is_missing and not found
            continue
        thread, end, is_missing = launch.get("tid"), float(launch["ts"]) + float(launch.get("dur", 0)), not found
        number += 1
        missing += is_missing
    return number, missing


def clip(events: Sequence[GpuEvent], length: float) -> list[GpuEvent]:
    """Returns what lies within ``length`` microseconds from the start of the first event."""
    last = events[0].start + length if events else 0.0
    return [replace(event, end=min(event.end, last)) for event in events if event.start < last]


def attribute(events: Iterable[GpuEvent]) -> tuple[list[float], float]:
    """Shares the time from the first event to the last end out, each moment once.

    A moment belongs to the kernel that started first: one launched early waits for it. Copies get what no kernel has.

    Args:
        events: by start.

    Returns:
        Microseconds of each event, in order, and those in which the GPU did nothing.
    """
    events = list(events)
    own = [0.0] * len(events)
    busy: list[tuple[float, float]] = []  # disjoint intervals of kernels, ascending
    reached = float("-inf")
    for i, event in enumerate(events):
        if event.is_copy:
            continue
        begin = max(event.start, reached)
        if event.end > begin:
            own[i] = event.end - begin
            busy.append((begin, event.end))
            reached = event.end
    gaps = _gaps(busy, events)
    for i, event in enumerate(events):
        if event.is_copy:
            own[i] = _take(gaps, event)
    return own, sum(end - begin for begin, end in gaps)


def _gaps(busy: Sequence[tuple[float, float]], events: Sequence[GpuEvent]) -> list[tuple[float, float]]:
    if not events:
        return []
    edges = [(events[0].start, events[0].start), *busy]
    last = max(event.end for event in events)
    edges.append((last, last))
    return [(a[1], b[0]) for a, b in zip(edges, edges[1:]) if b[0] > a[1]]


def _take(gaps: list[tuple[float, float]], event: GpuEvent) -> float:
    """Removes an event's time from the gaps and returns how much there was."""
    taken, left = 0.0, []
    for begin, end in gaps:
        low, high = max(begin, event.start), min(end, event.end)
        if high <= low:
            left.append((begin, end))
            continue
        taken += high - low
        left.extend(part for part in ((begin, low), (high, end)) if part[1] > part[0])
    gaps[:] = left
    return taken


def breakdown(events: Sequence[GpuEvent], num_steps: int, num_top: int = 15) -> dict[str, Any]:
    """Returns where the time of a step goes; JSON-ready, times in milliseconds per step.

    Args:
        events: by start, of ``num_steps`` whole steps.
        num_steps: at least 1.
        num_top: kernels to name, those that take longest.
    """
    own, idle = attribute(events)
    kinds: defaultdict[str, float] = defaultdict(float)
    kernels: defaultdict[str, list[float]] = defaultdict(list)
    for event, time in zip(events, own):
        kinds[classify(event)] += time
        kernels[event.name].append(time)
    total = sum(own) + idle
    parts = {**{kind: kinds[kind] for kind in KINDS}, "idle": idle}
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:num_top]
    return {
        "num_steps": num_steps,
        "step_ms": total / 1e3 / num_steps,
        "parts_ms": {name: time / 1e3 / num_steps for name, time in parts.items()},
        "num_kernels_per_step": sum(not event.is_copy for event in events) / num_steps,
        "kernels": [
            {
                "name": name,
                "kind": classify(next(event for event in events if event.name == name)),
                "ms": sum(kernels[name]) / 1e3 / num_steps,
                "calls": len(kernels[name]) / num_steps,
            }
            for name in longest
        ],
    }
