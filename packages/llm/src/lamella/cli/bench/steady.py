"""A short stretch of a workload in its steady state, seen by the GPU's profiler.

The engine runs in its own thread. The profiler is told to record the GPU only, so it sees what every thread launches.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lamella.cli.bench.kernels import breakdown, clip, count_launches, read_trace
from lamella.cli.bench.plan import BenchPlan
from lamella.cli.bench.workload import random_prompts
from lamella.llm import LLM
from lamella.outputs import RequestOutput
from lamella_core.errors import LamellaError, RequestError
from lamella_executor import SamplingParams
from lamella_executor.stats import IterationStats

NUM_STEPS = 32
MOST_MISSING = 0.1  # of the launches: those of the last step or two run after the end of the session
_ATTEMPTS = 2
_START_TIMEOUT_S = 120.0
_POLL_S = 0.005


def staggered(isl: int, osl: int, count: int) -> list[tuple[int, int]]:
    """Returns (prompt tokens, tokens to generate) of ``count`` requests that look like requests in mid-life.

    Their contexts are spread evenly between ``isl`` and ``isl + osl``, as those of a workload that has run for long.
    The least advanced come first, so that none ends before the last of them has started.
    """
    done = [index * osl // count for index in range(count)]
    return [(isl + past, osl - past) for past in done]


def profile_steps(llm: LLM, plan: BenchPlan, num_running: int) -> dict[str, Any]:
    """Runs some steps of the workload under the profiler; returns their `breakdown`.

    Args:
        llm: serves nothing else meanwhile.
        plan: resolved.
        num_running: requests that run at once in the steady state.

    Raises:
        LamellaError: the load did not start, or the profiler lost kernels.
    """
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # or kernels inside CUDA graphs are lost after the first session
    with _profiler():
        pass  # the first session loads the tracing library, which takes seconds
    for attempt in range(_ATTEMPTS):
        trace, steps = _record(llm, plan, num_running)
        launched, missing = count_launches(trace)
        if missing <= MOST_MISSING * launched:
            break
        if attempt == _ATTEMPTS - 1:
            raise LamellaError(
                f"the profiler lost the kernels of {missing} of {launched} launches, {_ATTEMPTS} times; what it kept "
                "would mislead"
            )
    events = read_trace(trace)
    if all(event.is_copy for event in events):
        raise LamellaError("the profiler recorded no kernel; another tool may hold the GPU's tracing interface")
    step_s = (steps[-1].timestamp_s - steps[0].timestamp_s) / (len(steps) - 1)
    window = clip(events, 1e6 * step_s * NUM_STEPS)
    return {
        **breakdown(window, NUM_STEPS),
        "num_running": sum(s.num_running for s in steps) / len(steps),
        "num_context_tokens": sum(s.num_context_tokens for s in steps) / len(steps),
    }


def _record(llm: LLM, plan: BenchPlan, num_running: int) -> tuple[dict[str, Any], list[IterationStats]]:
    """Returns the trace of some steps in the steady state, and their statistics."""
    with _steady_load(llm, plan, num_running) as top_up:
        with _profiler() as session:
            first = _iteration(llm)
            _wait_for(lambda: _iteration(llm) > first + NUM_STEPS, "steps", top_up)
            steps = [s for s in llm.get_stats() if s.iteration > first]
    return _trace(session), steps


@contextmanager
def _steady_load(llm: LLM, plan: BenchPlan, num_running: int) -> Iterator[Callable[[], None]]:
    """Starts ``num_running`` requests; yields what replaces those that have ended. All are gone on exit."""
    seeds = itertools.count(plan.seed + 1)
    running: list[RequestOutput] = []

    def submit(isl: int, osl: int) -> None:
        prompt = random_prompts(llm.engine.spec.model.vocab_size, isl, 1, next(seeds))[0]
        running.append(llm.generate_async(prompt, SamplingParams(max_tokens=osl, ignore_eos=True)))

    def top_up() -> None:
        left = [output for output in running if not output.finished]
        num_ended = len(running) - len(left)
        running[:] = left
        for _ in range(num_ended):
            submit(plan.isl, plan.osl)

    try:
        for isl, osl in staggered(plan.isl, plan.osl, num_running):
            submit(isl, osl)
        last = running[-1]
        _wait_for(lambda: last.finished or bool(last.token_ids), "requests", top_up)
        yield top_up
    finally:
        for output in running:
            output.abort()
        for output in running:
            try:
                output.result()
            except RequestError:
                continue  # the numbers of this run do not depend on how it ends


@contextmanager
def _profiler() -> Iterator[torch.profiler.profile]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as session:
        yield session


def _trace(session: torch.profiler.profile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        session.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))


def _iteration(llm: LLM) -> int:
    stats = llm.get_stats()
    return stats[-1].iteration if stats else 0


def _wait_for(condition: Callable[[], bool], what: str, meanwhile: Callable[[], None]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not condition():
        meanwhile()
        if time.monotonic() > deadline:
            raise LamellaError(f"the {what} to be profiled did not come within {_START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
