"""Choosing a matmul kernel for every weight: candidates of each distinct shape are timed on this machine, once."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lamella_builder.steps.clock import Advance
from lamella_builder.steps.gpu_algorithms import refine
from lamella_builder.steps.gpu_timing import time_gpu_plans
from lamella_builder.steps.timing_cache import TimedChoice, gpu_environment
from lamella_core.checkpoint.layout import MatmulWeight, arrange, matmul_weights
from lamella_core.config import DTYPES
from lamella_core.engine.build_config import BuildConfig
from lamella_core.kernels.matmul import MatmulPlan, candidate_plans, default_plan

if TYPE_CHECKING:
    from lamella_core.engine import EngineSpec
    from lamella_core.models.base import CausalLM

logger = logging.getLogger(__name__)

SECONDS_PER_SHAPE = 3.0  # after which the samples so far decide; less for weights below `FULL_TIME_NUMBERS`
FULL_TIME_NUMBERS = 1 << 20
LEAST_TIMED_NUMBERS = 1 << 16  # below, a call's overhead outweighs its arithmetic: the default plan serves
SAMPLES = 7  # per candidate and row count, where time allows
FEW_GPU_ROWS = (1, 4, 16)
PREFILL_ROWS = 256  # rows of a long prompt chunk; more changes the time in proportion, not the order
_HOPELESS = 2.0  # a candidate this many times slower than the best at its first sample is not sampled again
_FIRST_CALL_SECONDS = 0.05  # that any first call may take
_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn}
COLD_BYTES = 64 << 20  # of weights that a decoding step walks through, so that caches are as cold as in a model


@dataclass(frozen=True)
class Shape:
    """What a choice depends on."""

    n: int
    k: int
    dtype: torch.dtype
    is_output_layer: bool


@dataclass(frozen=True)
class Choice:
    """The plan for one shape, and why.

    ``milliseconds`` maps each candidate (as JSON-ready plan, in order) to its median per row count; ``has_failed``
    says that something could not be timed, ``untimed`` from how many rows on time did not suffice.
    """

    shape: Shape
    plan: MatmulPlan
    count: int  # weights of this shape
    milliseconds: tuple[tuple[MatmulPlan, dict[int, float]], ...] = ()
    has_failed: bool = field(default=False, compare=False)
    untimed: int | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record that goes into the engine."""
        return {
            "n": self.shape.n,
            "k": self.shape.k,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "is_output_layer": self.shape.is_output_layer,
            "count": self.count,
            "plan": self.plan.to_dict(),
            "candidates": [
                {"plan": plan.to_dict(), "milliseconds": {str(m): round(ms, 5) for m, ms in times.items()}}
                for plan, times in self.milliseconds
            ],
        }


def recorded_choices(spec: EngineSpec) -> dict[Shape, Choice]:
    """Returns the choices that an engine was built with, so that another rank of the same model makes the same."""
    choices = {}
    for record in spec.timings:
        shape = Shape(record["n"], record["k"], _DTYPES[record["dtype"]], record["is_output_layer"])
        choices[shape] = Choice(shape, MatmulPlan.from_dict(record["plan"]), record["count"])
    return choices


def choose_kernels(
    model: CausalLM, build: BuildConfig, advance: Advance, known: Mapping[Shape, Choice] | None = None
) -> dict[Shape, Choice]:
    """Returns the choice for each shape of matmul in the model.

    On a CPU, float32 weights get only kernels whose rows do not depend on the rows computed with them.

    Args:
        model: its weights in the plain layout, on the device of ``build``.
        build: resolved; gives the device, the row counts and ``kernel_selection``.
        advance: told of each shape.
        known: choices to take over.
    """
    known = known or {}
    groups: dict[Shape, list[MatmulWeight]] = {}
    for held in matmul_weights(model):
        shape = Shape(held.n, held.k, held.weight.dtype, held.is_output_layer)
        groups.setdefault(shape, []).append(held)
    choices = {}
    for done, (shape, members) in enumerate(groups.items()):
        choices[shape] = known[shape] if shape in known else _choose(shape, members, build)
        advance(done + 1, len(groups))
    return choices


def row_counts(shape: Shape, build: BuildConfig) -> list[int]:
    """Returns the numbers of rows to time: one decoding request, a full batch, a long prompt chunk.

    On a GPU long prompts have one kernel, and a few requests have several.
    """
    batch = build.opt_num_tokens or build.max_batch_size
    if build.device == "cuda":
        return sorted({m for m in (*FEW_GPU_ROWS, batch) if m <= build.max_num_tokens})
    rows = {1, min(batch, build.max_num_tokens)}
    if not shape.is_output_layer:
        rows.add(min(PREFILL_ROWS, build.max_num_tokens))
    return sorted(rows)


def _choose(shape: Shape, members: Sequence[MatmulWeight], build: BuildConfig) -> Choice:
    strict, count, device = shape.dtype == torch.float32, len(members), members[0].weight.device.type
    candidates = candidate_plans(shape.dtype, shape.n, shape.k, require_batch_invariant=strict, device=device)
    too_small = shape.n * shape.k < LEAST_TIMED_NUMBERS
    is_grouped = device == "cuda" and all(held.is_stacked for held in members)  # experts have a kernel of their own
    default = functools.partial(default_plan, shape.dtype, shape.n, shape.k, batch_invariant=strict, device=device)
    if build.kernel_selection == "default" or too_small or is_grouped or not candidates:
        return Choice(shape, default(), count)
    if device != "cuda":
        return _time(shape, members, build, candidates) or Choice(shape, default(), count)
    kept = TimedChoice(_key(shape, members, build, candidates))
    found = kept.load()
    if found is None:
        choice = _time(shape, members, build, candidates)
    else:
        logger.info("[%d, %d]: kernels as they were timed before; delete %s to time again", shape.n, shape.k, kept.path)
        choice = Choice(shape, found[0], count, untimed=found[1])
        if choice.untimed is None:
            return choice
        choice = _with_algorithms(choice, members, build)
    if choice is None:
        return Choice(shape, default(), count)
    if not choice.has_failed:
        kept.save(choice.plan, choice.untimed)
    return choice


def _time(
    shape: Shape, members: Sequence[MatmulWeight], build: BuildConfig, candidates: Sequence[MatmulPlan]
) -> Choice | None:
    """Returns the fastest candidate, with algorithms for its ranges of rows; None if none of them runs."""
    count = len(members)
    if len(candidates) == 1:
        return _with_algorithms(Choice(shape, candidates[0], count), members, build)
    rows = row_counts(shape, build)
    if members[0].weight.device.type == "cuda":
        weights = [weight for held in members for weight in (held.weight if held.is_stacked else (held.weight,))]
        medians = time_gpu_plans(candidates, rows, weights, DTYPES[build.dtype or "bfloat16"])
    else:
        medians = time_plans(candidates, shape, rows)
    timed = [
        (plan, times)
        for plan, times in zip(candidates, medians, strict=True)
        if all(map(math.isfinite, times.values()))
    ]
    if not timed:
        return None
    best = min(timed, key=lambda pair: _slowdown(pair[1], [times for _, times in timed]))
    choice = Choice(shape, best[0], count, tuple(timed), has_failed=len(timed) < len(candidates))
    return _with_algorithms(choice, members, build)


def _key(
    shape: Shape, members: Sequence[MatmulWeight], build: BuildConfig, candidates: Sequence[MatmulPlan]
) -> dict[str, Any]:
    """Returns what a choice on a GPU depends on."""
    return {
        **gpu_environment(),
        "n": shape.n,
        "k": shape.k,
        "dtype": str(shape.dtype),
        "is_output_layer": shape.is_output_layer,
        "activations": build.dtype,
        "rows": row_counts(shape, build),
        "most_rows": _most_rows(shape, build),
        "has_plain_weights": bool(_plain(members)),
        "candidates": [plan.to_dict() for plan in candidates],
    }


def _with_algorithms(choice: Choice, members: Sequence[MatmulWeight], build: BuildConfig) -> Choice:
    """Returns the choice with a GPU library's fastest algorithm for each range of rows; see `gpu_algorithms.refine`."""
    shape, plan = choice.shape, choice.plan
    if plan.device != "cuda":
        return choice
    dtype = DTYPES[build.dtype or "bfloat16"]
    refined = refine(plan, _most_rows(shape, build), _plain(members), dtype, shape.n, shape.k, choice.untimed)
    if refined is None:
        return replace(choice, has_failed=True)
    return replace(choice, plan=refined.plan, untimed=refined.untimed)


def _most_rows(shape: Shape, build: BuildConfig) -> int:
    if shape.is_output_layer:
        return min(build.max_num_tokens, build.max_batch_size * build.max_beam_width)
    return build.max_num_tokens


def _plain(members: Sequence[MatmulWeight]) -> list[torch.Tensor]:
    """Returns the weights that are neither stacked nor have a bias."""
    return [held.weight for held in members if not held.is_stacked and getattr(held.module, "bias", None) is None]


def _slowdown(times: dict[int, float], all_times: Sequence[dict[int, float]]) -> float:
    """Returns the log of the geometric mean, over row counts, of how much slower than the best a candidate is."""
    return sum(math.log(ms / min(other[m] for other in all_times)) for m, ms in times.items()) / len(times)


def time_plans(plans: Sequence[MatmulPlan], shape: Shape, rows: Sequence[int]) -> list[dict[int, float]]:
    """Returns each plan's median milliseconds per row count; kernels that plans share are timed once.

    Candidates are measured in turns, so that a busy moment of the machine hits all of them; the median drops it.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(shape.n, shape.k, dtype=shape.dtype).uniform_(-0.05, 0.05, generator=generator)
    copies = max(1, min(8, COLD_BYTES // max(1, weight.nbytes)))
    arranged = {layout: arrange(weight, layout) for layout in {plan.layout for plan in plans}}
    stored = {layout: [w, *(w.clone() for _ in range(copies - 1))] for layout, w in arranged.items()}
    results: list[dict[int, float]] = [{} for _ in plans]
    seconds = SECONDS_PER_SHAPE * min(1.0, weight.numel() / FULL_TIME_NUMBERS) / len(rows)
    for m in rows:
        x = torch.empty(m, shape.k).uniform_(-1, 1, generator=generator).to(shape.dtype)
        kernels = {plan.kernel_name(m): plan for plan in plans}
        medians = _interleaved([_runner(plan, x, stored[plan.layout], shape.n) for plan in kernels.values()], seconds)
        by_kernel = dict(zip(kernels, medians, strict=True))
        for plan, result in zip(plans, results, strict=True):
            result[m] = by_kernel[plan.kernel_name(m)] * 1e3
    return results


def _runner(plan: MatmulPlan, x: torch.Tensor, weights: list[torch.Tensor], n: int) -> Callable[[], float]:
    """Returns a function that multiplies once, by the next copy of the weight, and returns the seconds it took."""
    turns = itertools.cycle(weights)

    def run() -> float:
        weight = next(turns)
        begin = time.perf_counter()
        plan.run(x, weight, n)
        return time.perf_counter() - begin

    return run


def _interleaved(runs: Sequence[Callable[[], float]], seconds: float) -> list[float]:
    """Returns the median seconds of each callable, sampled in turns until `SAMPLES` or the time is reached.

    The first call of each does not count (pages, threads and compiled code are made), unless it is already hopeless.
    """
    begin = time.perf_counter()
    samples = [[run()] for run in runs]
    live = [k for k, first in enumerate(samples) if first[0] <= _slowest_live(samples)]
    for turn in range(SAMPLES):
        for index in live:
            samples[index].append(runs[index]())
        if turn == 0:
            fastest = min(samples[index][1] for index in live)
            live = [index for index in live if samples[index][1] <= _HOPELESS * fastest]
        if time.perf_counter() - begin > seconds:
            break
    return [statistics.median(times[1:] or times) for times in samples]


def _slowest_live(first_calls: Sequence[Sequence[float]]) -> float:
    """Returns the seconds of a first call beyond which a candidate is given up."""
    return max(_FIRST_CALL_SECONDS, 2 * _HOPELESS * min(times[0] for times in first_calls))
