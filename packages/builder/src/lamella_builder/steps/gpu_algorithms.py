"""Choosing among the algorithms that cuBLASLt proposes, for each range of rows of a large weight.

torch takes the library's first proposal. Another takes its place in a range of rows where it is timed to be faster;
engines record it, so that the same engine computes the same bits again.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lamella_builder.steps.gpu_timing import GpuTimer
from lamella_core.kernels import cublaslt_library
from lamella_core.kernels.cublaslt import kernel_name
from lamella_core.kernels.cublaslt_library import Product
from lamella_core.kernels.matmul import MatmulPlan

logger = logging.getLogger(__name__)

# Products of smaller weights take little time. Weights that all ranks hold, such as routers, are among them: kernels
# that another version of the library on one of several machines lacks cannot make ranks differ there.
LEAST_NUMBERS = 4_000_000
ROW_LIMITS = (64, 128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192)
MOST_PROPOSALS = 8  # timed per range of rows
LEAST_GAIN = 1.015  # geometric mean over a range's row counts, of how much faster than torch's choice
MOST_LOSS = 1.01  # at either row count: noise, not a slowdown
_AS_GOOD = 1.005  # as the best: the algorithm of fewer rows serves on
SECONDS_PER_SHAPE = 2.0  # after which torch's choice serves the remaining rows, until a later build goes on
_LIBRARY_KERNELS = ("cublas", "cublas_fp8")  # of torch, that are cuBLASLt's products

# (rows, kernel names) -> seconds of each, infinite where it fails; and the algorithms proposed for so many rows.
Timer = Callable[[int, Sequence[str]], Mapping[str, float]]
Proposer = Callable[[int], Sequence[str]]


@dataclass(frozen=True)
class RowRange:
    """Row counts that one kernel serves, ``first`` to ``last``; timed are the last one and one in the middle."""

    first: int
    last: int

    @property
    def inside(self) -> int:
        return (self.first + self.last) // 2


@dataclass(frozen=True)
class Refined:
    """A plan whose last step, torch's choice, gave way to algorithms that are faster.

    Attributes:
        plan: that follows.
        gains: how many times faster they are, by the last row of each range.
        untimed: the fewest rows that remain to be timed, for want of time; None if none do.
    """

    plan: MatmulPlan
    gains: Mapping[int, float] = field(default_factory=dict)
    untimed: int | None = None


def row_ranges(fewest: int, most: int) -> list[RowRange]:
    """Returns the ranges that ``fewest`` to ``most`` rows fall into; the last ends at ``most``."""
    limits = sorted({limit for limit in ROW_LIMITS if fewest < limit < most} | {most})
    starts = [fewest, *(limit + 1 for limit in limits)]
    return [RowRange(start, last) for start, last in zip(starts, limits, strict=False) if start <= last]


def choose_algorithms(
    plan: MatmulPlan, ranges: Sequence[RowRange], propose: Proposer, timer: Timer, seconds: float
) -> Refined:
    """Returns a plan with the fastest algorithm for each range of rows.

    Args:
        plan: its last step is torch's choice, which serves where nothing is faster, and beyond the ranges.
        ranges: one after another, of rows that the last step serves.
        propose: names of kernels for a number of rows, from the one expected to be the fastest on.
        timer: measures kernels against each other.
        seconds: from then on ranges are not timed.
    """
    *few, (_, default) = plan.steps
    chosen: list[tuple[int | None, str]] = []
    if ranges and ranges[0].first > _fewest(plan):  # timed before: torch's choice is the fastest down there
        chosen.append((ranges[0].first - 1, default))
    gains: dict[int, float] = {}
    untimed = None
    before, deadline = default, time.monotonic() + seconds
    for span in ranges:
        if time.monotonic() > deadline:
            untimed = span.first
            break
        by_rank = itertools.zip_longest(propose(span.last), propose(span.inside))
        proposed = dict.fromkeys(name for pair in by_rank for name in pair if name is not None)
        names = dict.fromkeys([before, *list(proposed)[:MOST_PROPOSALS]])
        names.pop(default, None)
        before, gain = _fastest(span, default, list(names), before, timer)
        chosen.append((span.last, before))
        if before != default:
            gains[span.last] = gain
    steps = [*few, *chosen, (None, default)]
    merged = [step for step, following in itertools.pairwise(steps) if step[1] != following[1]]
    return Refined(replace(plan, steps=(*merged, steps[-1])), gains, untimed)


def _fewest(plan: MatmulPlan) -> int:
    """Returns from how many rows on a plan's last step serves."""
    return 1 + max((limit for limit, _ in plan.steps if limit is not None), default=0)


def _fastest(span: RowRange, default: str, names: Sequence[str], before: str, timer: Timer) -> tuple[str, float]:
    """Returns the kernel for a range, and its gain over ``default``; ``before`` serves fewer rows."""
    live, slowdown = list(names), dict.fromkeys(names, 1.0)
    for rows in (span.last, span.inside):
        measured = timer(rows, [default, *live]) if live else {}
        live = [name for name in live if measured[name] <= measured[default] * MOST_LOSS < math.inf]
        for name in live:
            slowdown[name] *= math.sqrt(measured[name] / measured[default])
    if not live:
        return default, 1.0
    best = min(live, key=slowdown.__getitem__)
    if before in live and slowdown[before] <= slowdown[best] * _AS_GOOD:
        best = before
    gain = 1 / slowdown[best]
    return (best, gain) if gain >= LEAST_GAIN else (default, 1.0)


def refine(
    plan: MatmulPlan,
    most_rows: int,
    weights: Sequence[torch.Tensor],
    dtype: torch.dtype,
    n: int,
    k: int,
    untimed: int | None = None,
) -> Refined | None:
    """Returns the plan with algorithms of cuBLASLt where they are faster than torch's choice; None after an error.

    Args:
        plan: for the GPU.
        most_rows: that a step computes.
        weights: [n, k] of one dtype on the GPU, which have no bias.
        dtype: of the activations and results.
        n: output features.
        k: input features.
        untimed: of an earlier result, whose plan this is: the ranges from there on are timed.
    """
    default, loaded = plan.steps[-1][1], cublaslt_library.library()
    stored = weights[0].dtype if weights else torch.float32
    fewest = untimed or _fewest(plan)
    serves = stored in cublaslt_library.DATA_TYPES and default in _LIBRARY_KERNELS and not (n % 16 or k % 16)
    if not serves or n * k < LEAST_NUMBERS or most_rows < fewest or loaded is None or not loaded.is_ready():
        return Refined(plan)

    out_dtype = dtype if stored == torch.float8_e4m3fn else stored

    def propose(rows: int) -> list[str]:
        found = loaded.proposals(Product(rows, n, k, stored, out_dtype), MOST_PROPOSALS)
        return [kernel_name(loaded.version, algorithm) for algorithm in found]

    began = time.monotonic()
    try:
        refined = choose_algorithms(
            plan, row_ranges(fewest, most_rows), propose, GpuTimer(weights, dtype), SECONDS_PER_SHAPE
        )
    except RuntimeError as error:
        logger.warning("torch's choice of algorithms serves [%d, %d]: %s", n, k, str(error).splitlines()[0])
        return None
    gained = ", ".join(f"{rows} rows {100 * (gain - 1):.1f} %" for rows, gain in refined.gains.items())
    logger.info(
        "%s [%d, %d]: %s; chosen in %.1f s%s",
        str(stored).removeprefix("torch."), n, k,
        f"faster algorithms up to {gained}" if gained else "torch's choice of algorithms is the fastest",
        time.monotonic() - began,
        f", which did not suffice for {refined.untimed} rows and more" if refined.untimed else "",
    )  # fmt: skip
    return refined
