"""Runs requests and takes the time: token ids in and out, every output of exactly the wanted length."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

import torch

from lamella.cli.bench.plan import BenchPlan
from lamella.llm import LLM
from lamella.outputs import RequestOutput
from lamella_executor import SamplingParams


@dataclass(frozen=True)
class Measured:
    """One measurement. Times in seconds."""

    outputs: list[RequestOutput]
    wall_s: float  # throughput: from first submission to last end; latency: sum of the whole runs
    runs: list[dict[str, float]]  # latency: of each run, seconds to the end and to the first token; else empty


def random_prompts(vocab_size: int, isl: int, count: int, seed: int) -> list[list[int]]:
    """Returns ``count`` prompts of ``isl`` uniform token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, isl), generator=generator).tolist()


def stream_prompts(vocab_size: int, seed: int, isl: int, count: int, stream: int) -> list[list[int]]:
    """Returns the prompts of one phase of a benchmark; those of another ``stream`` differ.

    So nothing of one phase is known in the next. Streams from 0 on are measured (latency: one per run), -1 is the first
    token, and those from -2 down are the warm-up.
    """
    return random_prompts(vocab_size, isl, count, (seed * 1_000_003 + stream) % (1 << 63))


def first_token(llm: LLM, plan: BenchPlan) -> None:
    """Generates one token: what was put off until the first request has happened afterwards."""
    _run(llm, _prompts(llm, plan, 1, -1), SamplingParams(max_tokens=1, ignore_eos=True), 1)


def warm_up(llm: LLM, plan: BenchPlan) -> None:
    """Runs ``plan.warmup`` requests, or runs in latency mode."""
    count = plan.warmup or 0
    if plan.mode == "latency":
        for index in range(count):
            _run(llm, _prompts(llm, plan, plan.concurrency, -2 - index), plan.params, plan.concurrency)
    elif count:
        _run(llm, _prompts(llm, plan, count, -2), plan.warmup_params, plan.concurrency)


def measure(llm: LLM, plan: BenchPlan) -> Measured:
    """Runs the workload, which fits the engine: see `BenchPlan.check_fits`."""
    return _latency(llm, plan) if plan.mode == "latency" else _throughput(llm, plan)


def _throughput(llm: LLM, plan: BenchPlan) -> Measured:
    prompts = _prompts(llm, plan, plan.num_requests, 0)
    start = time.perf_counter()
    outputs = _run(llm, prompts, plan.params, plan.concurrency)
    return Measured(outputs, time.perf_counter() - start, [])


def _latency(llm: LLM, plan: BenchPlan) -> Measured:
    """Each run: the batch for one token, then for all; the difference is that of the decode steps alone."""
    outputs: list[RequestOutput] = []
    runs: list[dict[str, float]] = []
    for index in range(plan.num_requests):
        prompts = _prompts(llm, plan, plan.concurrency, index)
        start = time.perf_counter()
        _run(llm, prompts, SamplingParams(max_tokens=1, ignore_eos=True), plan.concurrency)
        middle = time.perf_counter()
        whole = _run(llm, prompts, plan.params, plan.concurrency)
        runs.append({"first_token_s": middle - start, "whole_s": time.perf_counter() - middle})
        outputs += whole
    return Measured(outputs, sum(run["whole_s"] for run in runs), runs)


def time_per_output_token(runs: list[dict[str, float]], osl: int) -> float | None:
    """Returns the median over the runs of (T(osl) - T(1)) / (osl - 1) in seconds; None for one token."""
    if osl < 2:
        return None
    return statistics.median((run["whole_s"] - run["first_token_s"]) / (osl - 1) for run in runs)


def _prompts(llm: LLM, plan: BenchPlan, count: int, stream: int) -> list[list[int]]:
    return stream_prompts(llm.engine.spec.model.vocab_size, plan.seed, plan.isl, count, stream)


def _run(llm: LLM, prompts: list[list[int]], params: SamplingParams, concurrency: int) -> list[RequestOutput]:
    """Keeps ``concurrency`` requests in flight; returns the outputs in order."""
    outputs: list[RequestOutput] = []
    waiting: deque[RequestOutput] = deque()
    for prompt in prompts:
        if len(waiting) >= concurrency:
            _wait_for_one(waiting)
        outputs.append(llm.generate_async(prompt, params))
        waiting.append(outputs[-1])
    for output in waiting:
        output.result()
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
