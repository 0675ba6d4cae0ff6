"""The tables of ``lamella bench`` on stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lamella.cli.bench.summary import PERCENTILES
from lamella.cli.machine import GIB

_VERSIONS = ("lamella", "torch", "python", "cuda", "driver", "triton", "flashinfer")


def print_report(out: Console, report: dict[str, Any]) -> None:
    """Prints what was measured, on what, and how far it is from what the hardware allows."""
    _print_head(out, report)
    out.print(_rates(report))
    _print_times(out, report["results"])
    steps = report["steps"]
    if steps is not None:
        out.print(
            f"{steps['num_steps']} steps: {steps['mean_running']:.1f} requests running on "
            f"average, {steps['most_running']} at most; {steps['mean_context_tokens']:.1f} prompt and "
            f"{steps['mean_generation_tokens']:.1f} generated tokens; {steps['num_paused']} pauses; "
            f"{steps['parts_ms']['host']:.2f} ms of the host in a step of {steps['step_ms']:.2f} ms{_host(steps)}",
            soft_wrap=True,
        )


def _host(steps: dict[str, Any]) -> str:
    """Returns how long the host takes in steps of either kind, if there were both."""
    decode, prompts = steps["host_ms"]["decode"], steps["host_ms"]["prompts"]
    if decode is None or prompts is None:
        return ""
    return (
        f" (median {decode['median']:.2f} ms in {decode['num_steps']} steps that only decode, "
        f"{prompts['median']:.2f} ms in {prompts['num_steps']} with prompts)"
    )


def print_breakdown(out: Console, report: dict[str, Any]) -> None:
    """Prints where the time of a step goes: by kernels on a GPU, by parts of the engine's loop on a CPU."""
    found = report["breakdown"]
    if found is None:
        return
    if "error" in found:
        out.print(f"no breakdown: {found['error']}", markup=False, soft_wrap=True)
        return
    total = found["step_ms"]
    table = Table("part of a step", "ms", "%")
    for name, time in found["parts_ms"].items():
        table.add_row(_LABELS.get(name, name), f"{time:.3f}", f"{100 * time / total:.1f}" if total else "")
    table.add_row("step", f"{total:.3f}", "100.0")
    out.print(table)
    if "kernels" in found:
        out.print(
            f"{found['num_steps']} steps traced in the steady state, {found['num_running']:.0f} requests running, "
            f"{found['num_context_tokens']:.0f} prompt tokens and {found['num_kernels_per_step']:.0f} kernels a step",
            soft_wrap=True,
        )
        kernels = Table("kernel", "kind", "calls", "ms", title="per step", title_justify="left")
        for kernel in found["kernels"]:
            kernels.add_row(kernel["name"][:70], kernel["kind"], f"{kernel['calls']:.1f}", f"{kernel['ms']:.3f}")
        out.print(kernels, markup=False)


_LABELS = {
    "idle": "host gap (GPU idle)",
    "glue": "glue (norms, activations, rotary, quantization, copies in kernels)",
    "messages": "messages between ranks",
    "forward": "forward",
    "host": "scheduling, sampling, updates",
    "between": "between steps",
}


def _print_head(out: Console, report: dict[str, Any]) -> None:
    plan, engine, host, gpu = (report[key] for key in ("plan", "engine", "machine", "gpu"))
    what = f"{plan['num_requests']} {'runs' if plan['mode'] == 'latency' else 'requests'}"
    quantized = ", ".join(str(value) for value in (engine["quant_algo"], engine["kv_cache_quant_algo"]) if value)
    lines = [
        f"{engine['architecture']}, {engine['num_hidden_layers']} layers, hidden {engine['hidden_size']}, "
        f"{engine['dtype']}{', quantized ' + quantized if quantized else ''}; {what} of {plan['isl']} in, "
        f"{plan['osl']} out, {plan['concurrency']} in flight",
        *_ranks(engine["mapping"]),
        f"{host['cpu']}, {host['usable_cores']} cores, {host['torch_threads']} threads",
    ]
    if gpu is not None:
        count = engine["mapping"]["world_size"]
        name = f"{count} x {gpu['name']}" if count > 1 else gpu["name"]
        lines.append(f"{name}, {gpu['memory_bytes'] / GIB:.1f} GiB, compute capability {gpu['capability']}")
    names = [f"{name} {report['versions'][name]}" for name in _VERSIONS if report["versions"].get(name)]
    lines.append(", ".join(names) + (f", commit {report['commit']}" if report["commit"] else ""))
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def _ranks(mapping: dict[str, Any]) -> list[str]:
    """Returns a line that says how a model is spread, none if it is not."""
    if mapping["world_size"] == 1:
        return []
    tp, pp, ep = mapping["tp_size"], mapping["pp_size"], mapping["moe_ep_size"]
    experts = f", experts in {ep} groups" if ep > 1 else ""
    return [f"{mapping['world_size']} ranks: tp_size {tp} x pp_size {pp}{experts}"]


def _rates(report: dict[str, Any]) -> Table:
    results, roofline = report["results"], report["roofline"]
    whose = " of rank 0" if report["engine"]["mapping"]["world_size"] > 1 else ""
    table = Table("metric", "value")
    if results.get("time_per_output_token_s"):
        table.add_row("time per output token", f"{1e3 * results['time_per_output_token_s']:.3f} ms")
    table.add_row("output tokens/s", f"{results['output_throughput']:.1f}")
    table.add_row("total tokens/s", f"{results['total_throughput']:.1f}")
    table.add_row("requests/s", f"{results['request_throughput']:.3f}")
    for row in _roofline_rows(roofline):
        table.add_row(*row)
    table.add_row("wall time", f"{results['wall_s']:.2f} s")
    table.add_row("load time", f"{report['load_s']:.2f} s")
    table.add_row("start to first token", f"{report['start_s']:.2f} s")
    table.add_row(f"peak memory{whose}", f"{report['peak_memory_bytes'] / GIB:.2f} GiB")
    if report["peak_gpu_memory_bytes"] is not None:
        table.add_row(f"peak GPU memory{whose}", f"{report['peak_gpu_memory_bytes'] / GIB:.2f} GiB")
    return table


def _roofline_rows(roofline: dict[str, Any] | None) -> list[tuple[str, str]]:
    if roofline is None:
        return []
    if "unknown" in roofline:
        return [("of the roofline", roofline["unknown"])]
    source = "measured rates" if roofline["is_measured"] else "data sheet rates"
    if roofline["num_gpus"] > 1:
        source += f", times {roofline['num_gpus']} GPUs without links"
    if "step_s" in roofline:
        rows = [("least time per token", f"{1e3 * roofline['step_s']:.3f} ms ({source})")]
    else:
        bounds = f"{roofline['serial_throughput']:.0f} (overlapped {roofline['overlap_throughput']:.0f}) tokens/s"
        rows = [("serial roofline", f"{bounds}, {source}")]
    if roofline["fraction"] is not None:
        rows.append(("of the roofline", f"{100 * roofline['fraction']:.1f} %"))
    return rows


def _print_times(out: Console, results: dict[str, Any]) -> None:
    times = Table("milliseconds", "mean", "min", *(f"P{p}" for p in PERCENTILES), "max")
    for key, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("latency_s", "latency")):
        values = results[key]
        if values is not None:
            keys = ("mean", "min", *(f"p{p}" for p in PERCENTILES), "max")
            times.add_row(label, *(f"{1000 * values[k]:.2f}" for k in keys))
    out.print(times)
