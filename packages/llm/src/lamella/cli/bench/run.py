"""``lamella bench``: fixed prompt and output lengths, random token ids, greedy, end tokens ignored, no prefix reuse.

Tokens only: no tokenizer takes part. Times of a request come from the engine: TTFT is submission to first token
(queueing included), TPOT the mean time between tokens, latency submission to the end.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from lamella.cli.bench.environment import environment, peak_memory
from lamella.cli.bench.plan import BenchPlan
from lamella.cli.bench.report import print_breakdown, print_report
from lamella.cli.bench.summary import against_roofline, summarize, summarize_steps, typical_running
from lamella.cli.bench.workload import first_token, measure, warm_up
from lamella.llm import LLM
from lamella_core.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
PACKAGES = ("lamella", "lamella_core", "lamella_builder", "lamella_executor")
_IDLE_TIMEOUT_S, _POLL_S = 1.0, 0.002


def run_bench(plan: BenchPlan, report_json: Path | None, started: float, log_level: str = "warning") -> dict[str, Any]:
    """Runs the benchmark, prints its tables and returns (and maybe writes) the report.

    Args:
        plan: what to measure.
        report_json: file for everything that was measured.
        started: ``time.perf_counter()`` when the command began; the time to the first token counts from here.
        log_level: of what is shown on stderr.
    """
    err, out = Console(stderr=True, highlight=False), Console(highlight=False)
    if report_json is not None:
        _check_writable(report_json)
    plan = plan.resolved()
    with _shown_log(log_level, err):
        report = _run(plan, started, err, out)
    if report_json is not None:
        report_json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _run(plan: BenchPlan, started: float, err: Console, out: Console) -> dict[str, Any]:
    opening = time.perf_counter()
    with err.status(f"loading {escape(plan.model)}"):
        llm = plan.open()
    with llm:
        plan.check_fits(llm.engine.spec.build.max_seq_len)
        load_s = time.perf_counter() - opening
        with err.status("warming up"):
            first_token(llm, plan)
            start_s = time.perf_counter() - started
            warm_up(llm, plan)
        report = {"plan": asdict(plan), "engine": _describe(llm), "load_s": load_s, "start_s": start_s}
        with err.status(f"running {plan.num_requests} {'runs' if plan.mode == 'latency' else 'requests'}"):
            running = _measure(llm, plan, report)
        print_report(out, report)
        with err.status("tracing some steps"):
            report["breakdown"] = _breakdown(llm, plan, running, report) if plan.breakdown else None
    print_breakdown(out, report)
    return report


@contextmanager
def _shown_log(level: str, console: Console) -> Iterator[None]:
    """Shows what our packages log, memory plan and start times among it."""
    if level.lower() not in LOG_LEVELS:
        raise ConfigError(f"--log-level is {level!r}; allowed: {', '.join(LOG_LEVELS)}")
    handler = RichHandler(console=console, show_path=False)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level.upper())
    try:
        yield
    finally:
        for logger, old in zip(loggers, before):
            logger.removeHandler(handler)
            logger.setLevel(old)


def _measure(llm: LLM, plan: BenchPlan, report: dict[str, Any]) -> int:
    """Measures and adds to the report; returns how many requests ran at once in the middle of it."""
    before = _last_iteration(llm)
    measured = measure(llm, plan)
    _await_idle(llm)
    steps = [s for s in llm.get_stats() if s.iteration > before]
    spec = llm.engine.spec
    report.update(environment(spec.build.device))
    gpu_name = report["gpu"]["name"] if report["gpu"] else None
    report.update(peak_memory(spec.build.device))
    report["results"] = summarize(measured, plan)
    report["steps"] = summarize_steps(steps, decode_only=plan.mode == "latency")
    report["roofline"] = against_roofline(report["results"], plan, spec.model, gpu_name)
    return typical_running(steps) or plan.concurrency


def _await_idle(llm: LLM) -> None:
    """Waits until the last step, whose results are here already, is in the statistics too."""
    deadline = time.monotonic() + _IDLE_TIMEOUT_S
    while time.monotonic() < deadline:
        stats = llm.get_stats()
        if not stats or not (stats[-1].num_running or stats[-1].num_queued):
            return
        time.sleep(_POLL_S)


def _last_iteration(llm: LLM) -> int:
    stats = llm.get_stats()
    return stats[-1].iteration if stats else 0


def _breakdown(llm: LLM, plan: BenchPlan, num_running: int, report: dict[str, Any]) -> dict[str, Any] | None:
    """Returns where the time of a step goes; the numbers above stand whatever happens here."""
    if report["gpu"] is None:
        steps = report["steps"]
        return None if steps is None else {key: steps[key] for key in ("num_steps", "step_ms", "parts_ms")}
    from lamella.cli.bench.steady import profile_steps

    try:
        return profile_steps(llm, plan, num_running)
    except Exception as error:  # noqa: BLE001 - tracing is an extra: what it trips over must not lose the measurement
        return {"error": f"{type(error).__name__}: {error}"}


def _describe(llm: LLM) -> dict[str, Any]:
    spec = llm.engine.spec
    model, quantization = spec.model, spec.model.quantization.to_dict()
    return {
        "architecture": model.architecture,
        "num_hidden_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
        "quant_algo": quantization["quant_algo"],
        "kv_cache_quant_algo": quantization["kv_cache_quant_algo"],
        "mapping": model.mapping.to_dict(with_rank=False),
        "build": spec.build.to_dict(),
    }


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
