"""What `lamella-build` shows: the memory plan, progress, and the seconds of each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lamella_builder import steps
from lamella_builder.steps.memory import format_bytes
from lamella_core.config import ModelConfig
from lamella_core.engine import BuildConfig


def show_plan(console: Console, config: ModelConfig, build: BuildConfig, plan: steps.MemoryPlan) -> None:
    """Prints the model, the resolved limits and the memory plan."""
    mapping = config.mapping
    table = Table(title=f"{config.architecture}, {build.dtype}: memory plan", show_header=False)
    ranks = f"tp_size {mapping.tp_size} x pp_size {mapping.pp_size} = {mapping.world_size}"
    weights = [format_bytes(num_bytes) for num_bytes in plan.weight_bytes]
    of_all = f" of {format_bytes(plan.total_bytes)}" if plan.total_bytes else ""
    rows = {
        "device": {"cpu": "CPU", "cuda": "GPU"}[plan.device],
        "ranks": ranks,
        "weights per rank": weights[0] if len(set(weights)) == 1 else ", ".join(weights),
        "limits": f"max_batch_size {build.max_batch_size}, max_num_tokens {build.max_num_tokens}, "
        f"max_seq_len {build.max_seq_len}, max_beam_width {build.max_beam_width}",
        "KV cache per token": f"{plan.kv_bytes_per_token} bytes per rank ({build.kv_cache_type})",
        "KV tokens for all limits": f"{plan.kv_tokens_wanted} "
        f"({format_bytes(plan.kv_tokens_wanted * plan.kv_bytes_per_token)} per rank)",
        "KV tokens that fit here": str(plan.kv_tokens_that_fit),
        "activations, largest step": f"about {format_bytes(plan.activation_bytes)}",
        "peak while building": f"about {format_bytes(plan.build_bytes)}",
        "memory available": f"{format_bytes(plan.available_bytes)}{of_all}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def show_seconds(console: Console, seconds: Mapping[str, float]) -> None:
    """Prints how long each step took."""
    table = Table("step", "seconds")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}")
    table.add_row("total", f"{sum(seconds.values()):.2f}")
    console.print(table)


@contextmanager
def progress_bars(console: Console) -> Iterator[steps.Progress]:
    """Shows a bar per step while the block runs; yields the callback that a build reports to."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield report
