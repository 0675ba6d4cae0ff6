"""Experts' products checked against torch, then timed with several tiles at the shapes of three models, bf16 and fp8.

    python benchmarks/gpu_moe.py [--model mixtral qwen3 gpt_oss] [--tokens 1 16 4096] [--dtype bf16 fp8] [--json FILE]

A call is all that a layer does after routing: sorting, both products, the sum over a token's experts; with float8, one
scale per token. A time is that of one call in a CUDA graph of several, each with other random experts and the next
copy of the weights, so that the L2 cache holds little of what is read. TB/s counts the weights of experts that are hit;
bound is the time for that at the bandwidth of a pure read, or for the arithmetic at --tflops, whichever is longer.
"routing" is softmax and top-k of given scores. Tables come last; the tile in the code is marked *. Tiles of sorted rows
end in the number of programs per multiprocessor (r0: one per block), f where one block's loads overlap the last's
stores, S where warps have roles; for many rows per expert another table has each kernel's time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gpu_matmul import DTYPES, random, read_bandwidth, seconds
from gpu_moe_parts import Parts, time_parts

from lamella_core.kernels import ops
from lamella_core.kernels.experts import ExpertProjection, ExpertStack, Swiglu
from lamella_core.kernels.triton import moe
from lamella_core.kernels.triton.moe import Tile
from lamella_core.kernels.triton.moe_align import needs_sorting
from lamella_core.kernels.triton.moe_sorted import SortedTile

AnyTile = Tile | SortedTile
FP8 = torch.float8_e4m3fn
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
LAUNCHES = 6
TFLOPS = {"bf16": 800.0, "fp8": 1500.0}
LEAST_SORTED_ROWS = 32  # of an expert, for tiles of sorted rows to be worth trying
COMPILE_S = 60.0  # in which all tiles must have run once, or are left out
AGREE = 0.02  # of the largest result: how far tiles may differ


@dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    hidden: int
    inner: int
    copies: int = 1  # of the weights, so that what one call reads is not in the cache for the next

    @property
    def numbers(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner

    def has_many_rows(self, tokens: int) -> bool:
        """Whether sorting rows may pay."""
        return tokens * self.top_k >= LEAST_SORTED_ROWS * self.experts


SHAPES = {
    "mixtral": Shape(8, 2, 4096, 14336),
    "qwen3": Shape(128, 8, 2048, 768, copies=2),
    "gpt_oss": Shape(32, 4, 2880, 2880),
}


def tiles(rows: float) -> list[Tile]:
    """Tile shapes worth trying for so many rows per expert that is hit, on average."""
    few = [
        Tile(16, 64, 256, 4, 4, swap=True, group=64), Tile(16, 64, 256, 4, 3, swap=True, group=64),
        Tile(16, 64, 128, 4, 6, swap=True, group=64), Tile(16, 128, 128, 4, 4, swap=True, group=64),
        Tile(16, 32, 256, 2, 4, swap=True, group=64), Tile(16, 32, 512, 4, 4, swap=False, group=64),
        Tile(16, 128, 256, 8, 3, swap=True, group=64),
    ]  # fmt: skip
    some = [
        Tile(32, 64, 256, 4, 4, swap=True, group=64), Tile(32, 128, 128, 4, 4, swap=True, group=64),
        Tile(64, 64, 128, 4, 5, swap=True, group=64), Tile(64, 128, 128, 4, 4, swap=True, group=64),
        Tile(64, 128, 128, 4, 4), Tile(64, 128, 128, 8, 4, swap=True), Tile(64, 256, 128, 8, 4),
    ]  # fmt: skip
    many = [
        Tile(128, 128, 128, 8, 4, group=16), Tile(128, 128, 128, 8, 3, group=8), Tile(128, 128, 128, 4, 4, group=16),
        Tile(128, 256, 128, 8, 3, group=16), Tile(128, 256, 128, 8, 4, group=16), Tile(128, 128, 128, 8, 4, group=1),
        Tile(64, 256, 128, 4, 4, group=16), Tile(256, 128, 128, 8, 3, group=8),
    ]  # fmt: skip
    if rows <= 12:
        return [*few, some[0]]
    if rows <= 100:
        return [few[0], *some, many[0], many[3]]
    return [some[3], *many]


def sorted_tiles() -> list[SortedTile]:
    """Tile shapes over sorted rows: one program per block; resident ones; two of these beside each other."""
    apart = {"resident": 0, "flatten": False}
    wide, narrow, low = (128, 256, 128, 8), (128, 128, 128, 8, 3), (64, 256, 128, 4, 2)
    return [
        SortedTile(*wide, 4, **apart), SortedTile(*wide, 3, **apart), SortedTile(*wide, 4, flatten=False),
        SortedTile(*wide, 4), SortedTile(*wide, 3), SortedTile(*wide, 4, group=8), SortedTile(*narrow, resident=2),
        SortedTile(*narrow, **apart), SortedTile(128, 128, 128, 4, 3, resident=2), SortedTile(*low, resident=2),
        SortedTile(*low, **apart),
    ]  # fmt: skip


def candidates(shape: Shape, tokens: int, dtype: torch.dtype) -> list[AnyTile]:
    """Tiles for a number of tokens, first the one that the code takes."""
    rows = moe.rows_per_expert(tokens, shape.top_k, shape.experts)
    is_sorted = rows >= moe.LEAST_SORTED_ROWS
    chosen = moe.SORTED_TILE if is_sorted else moe.default_tile(tokens, shape.top_k, shape.experts, dtype)
    by_copy = sorted_tiles() if rows >= LEAST_SORTED_ROWS else []
    return list(dict.fromkeys([chosen, *tiles(rows), *by_copy]))


def short(tile: AnyTile) -> str:
    if isinstance(tile, SortedTile):
        size = f"sorted {tile.block_m}x{tile.block_n}x{tile.block_bytes}b"
        return f"{size}w{tile.num_warps}s{tile.num_stages}g{tile.group}r{tile.resident}" + "f" * tile.flatten
    size = f"{tile.block_m}x{tile.block_n}x{tile.block_bytes}b"
    return f"{size}w{tile.num_warps}s{tile.num_stages}g{tile.group}" + ("~" if tile.swap else "")


def make_stack(shape: Shape, dtype: torch.dtype, *, random_weights: bool = True) -> ExpertStack:
    def projection(n: int, k: int) -> ExpertProjection:
        if not random_weights:
            weight = torch.empty(shape.experts, n, k, device="cuda", dtype=dtype)
        else:
            weight = random(shape.experts, n, k, bound=0.02 if dtype != FP8 else 1.0, dtype=dtype)
        scale = torch.full((shape.experts, n), 0.02, device="cuda") if dtype == FP8 else None
        return ExpertProjection(weight, None, scale)

    up, down = projection(2 * shape.inner, shape.hidden), projection(shape.hidden, shape.inner)
    return ExpertStack(shape.experts, 0, up, down, ops.silu_and_mul, Swiglu())


def routed(shape: Shape, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.randn(tokens, shape.experts, device="cuda", generator=generator)
    weights, experts = scores.softmax(-1).topk(shape.top_k, dim=-1)
    return experts, weights


# Checks and compiling -------------------------------------------------------------------------------------------------

Job = tuple[str, int, str, AnyTile]


def compile_one(job: Job) -> str | None:
    """Compiles one tile's kernels into Triton's cache on disk, by running them on weights that hold anything."""
    model, tokens, dtype, tile = job
    shape = SHAPES[model]
    try:
        x = torch.zeros(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
        moe.gated_experts(x, *routed(shape, tokens, 0), make_stack(shape, DTYPES[dtype], random_weights=False), tile)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - reported, and that tile is left out
        return f"{job}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def compile_jobs(models: list[str], tokens: list[int], dtypes: list[str]) -> list[Job]:
    jobs: dict[tuple[str, bool, str, AnyTile], Job] = {}
    for model in models:
        for count in tokens:
            is_sorted = needs_sorting(count, SHAPES[model].top_k, SHAPES[model].experts)
            for dtype in dtypes:
                for tile in candidates(SHAPES[model], count, DTYPES[dtype]):
                    jobs.setdefault((model, is_sorted, dtype, tile), (model, count, dtype, tile))
    return list(jobs.values())


def compiled(jobs: list[Job], processes: int) -> list[str | None]:
    """Returns what is wrong with each job; one that hangs is left, with the process that ran it."""
    end = time.perf_counter() + COMPILE_S
    messages: list[str | None] = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for job, result in [(job, pool.apply_async(compile_one, (job,))) for job in jobs]:
            try:
                messages.append(result.get(timeout=max(1.0, end - time.perf_counter())))
            except multiprocessing.TimeoutError:
                messages.append(f"{job}: did not end")
    return messages


def check(model: str, dtype: str, tokens: int, tile: AnyTile) -> str | None:
    """Returns what is wrong with a tile's result for the first tokens, compared with float32 products."""
    shape = SHAPES[model]
    stack, x = make_stack(shape, DTYPES[dtype]), random(tokens, shape.hidden, bound=1.0, dtype=torch.bfloat16)
    experts, weights = routed(shape, tokens, 1)
    out = moe.gated_experts(x, experts, weights, stack, tile)
    rows = min(tokens, 4)
    expected = torch.zeros(rows, shape.hidden, device="cuda")
    scale = 0.02 if dtype == "fp8" else 1.0
    for row in range(rows):
        for expert, weight in zip(experts[row].tolist(), weights[row].tolist(), strict=True):
            gate_up = stack.gate_up.weight[expert].float() @ x[row].float() * scale
            inner = torch.nn.functional.silu(gate_up[: shape.inner]) * gate_up[shape.inner :]
            expected[row] += weight * scale * (stack.down.weight[expert].float() @ inner)
    error = ((out[:rows].float() - expected).abs().max() / expected.abs().max()).item()
    allowed = 0.08 if dtype == "fp8" else 0.02
    return None if error <= allowed else f"{model} {dtype} T={tokens} {short(tile)}: error {error:.3f}"


def disagreements(model: str, dtype: str, tokens: int, broken: set[Job]) -> Iterator[str]:
    """Compares all results of tiles over sorted rows with the first tile's, with experts that nobody chose.

    Twice each, with different random inputs and the same bits of a repeated call: what races does not agree.
    """
    shape = SHAPES[model]
    stack = make_stack(shape, DTYPES[dtype])
    for tile in sorted_tiles():
        if (model, dtype, tile) in {(job[0], job[2], job[3]) for job in broken}:
            continue
        for seed in (1, 2):
            x = random(tokens, shape.hidden, bound=1.0, dtype=torch.bfloat16)
            experts, weights = routed(shape, tokens, seed)
            experts = torch.where(experts < 2, experts + 2, experts)  # a token may choose one of them twice
            expected = moe.gated_experts(x, experts, weights, stack, moe.TILES[-1][1]).float()
            out = [moe.gated_experts(x, experts, weights, stack, tile) for _ in range(3)]
            error = ((out[0].float() - expected).abs().max() / expected.abs().max()).item()
            if not error <= AGREE or not all(torch.equal(out[0], other) for other in out[1:]):
                yield f"{model} {dtype} T={tokens} {short(tile)}: error {error:.4f} or not the same bits"
                broken.add((model, tokens, dtype, tile))
                break


# Timing ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    model: str
    dtype: str
    tokens: int
    tile: str
    is_chosen: bool
    microseconds: float
    tb_per_s: float
    tflop_per_s: float
    bound_us: float


def caller(
    x: torch.Tensor, routes: list[tuple[torch.Tensor, torch.Tensor]], stacks: list[ExpertStack], tile: AnyTile
) -> Callable[[int], object]:
    return lambda i: moe.gated_experts(x, *routes[i % len(routes)], stacks[i % len(stacks)], tile)


def time_model(
    model: str, dtype: str, tokens: list[int], bandwidth: float, broken: set[Job]
) -> Iterator[Result | Parts]:
    shape = SHAPES[model]
    stacks = [make_stack(shape, DTYPES[dtype]) for _ in range(shape.copies)]
    for count in tokens:
        x = random(count, shape.hidden, bound=1.0, dtype=torch.bfloat16)
        routes = [routed(shape, count, seed) for seed in range(LAUNCHES)]
        hit = sum(experts.unique().numel() for experts, _ in routes) / LAUNCHES
        num_bytes = hit * shape.numbers * DTYPES[dtype].itemsize
        flop = 2.0 * count * shape.top_k * shape.numbers
        bound = max(num_bytes / bandwidth, flop / (TFLOPS[dtype] * 1e12))
        for place, tile in enumerate(candidates(shape, count, DTYPES[dtype])):
            if any((model, dtype, tile) == (job[0], job[2], job[3]) for job in broken):
                continue
            s = seconds(caller(x, routes, stacks, tile), LAUNCHES)
            tb, tflop = num_bytes / s / 1e12, flop / s / 1e12
            yield Result(model, dtype, count, short(tile), place == 0, s * 1e6, tb, tflop, bound * 1e6)
            if dtype == "bf16" and shape.has_many_rows(count) and (place == 0 or isinstance(tile, SortedTile)):
                yield time_parts(model, short(tile), x, routes, stacks, tile)


def routing_us(shape: Shape, tokens: int) -> float:
    scores = torch.randn(tokens, shape.experts, device="cuda")
    return seconds(lambda _: ops.top_k_softmax(scores, shape.top_k, True), LAUNCHES) * 1e6


def print_tables(results: list[Result]) -> None:
    for model, dtype in dict.fromkeys((r.model, r.dtype) for r in results):
        print(f"\n{model} {dtype}: bound us; the tile in the code (*) and the fastest: us, TB/s of weights, TFLOP/s")
        mine = [r for r in results if (r.model, r.dtype) == (model, dtype)]
        for tokens in dict.fromkeys(r.tokens for r in mine):
            at = sorted((r for r in mine if r.tokens == tokens), key=lambda r: r.microseconds)
            shown = [*(r for r in at if r.is_chosen), *[r for r in at if not r.is_chosen][:6]]
            cells = "  ".join(
                f"{'*' * r.is_chosen}{r.tile} {r.microseconds:.1f} {r.tb_per_s:.2f} {r.tflop_per_s:.0f}" for r in shown
            )
            print(f"  T={tokens:<5} {at[0].bound_us:7.1f} | {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"])
    parser.add_argument("--tflops", type=float, nargs=2, help="arithmetic ceilings of bf16 and fp8")
    parser.add_argument("--json", type=Path, help="write every number there")
    parser.add_argument("--processes", type=int, default=12, help="that compile kernels; each holds a layer's weights")
    args = parser.parse_args()
    TFLOPS.update(zip(("bf16", "fp8"), args.tflops or (), strict=False))
    began = time.perf_counter()
    jobs = compile_jobs(args.model, args.tokens, args.dtype)
    messages = compiled(jobs, args.processes)
    broken = {job for job, message in zip(jobs, messages, strict=True) if message}
    print(*filter(None, messages), sep="\n")
    print(f"{len(jobs)} calls compiled in {time.perf_counter() - began:.0f} s")
    for model, dtype in ((m, d) for m in args.model for d in args.dtype):
        for tokens in (1, 3, 40, 1000):
            wrong = check(model, dtype, tokens, candidates(SHAPES[model], tokens, DTYPES[dtype])[0])
            print(wrong or f"{model} {dtype} T={tokens}: right")
        for tokens in (1000, max(args.tokens)):
            if SHAPES[model].has_many_rows(tokens):
                print(*disagreements(model, dtype, tokens, broken), "sorted tiles compared", sep="\n")
    bandwidth = read_bandwidth()
    print(f"read {bandwidth / 1e12:.2f} TB/s; checks done at {time.perf_counter() - began:.0f} s")
    results: list[Result] = []
    parts: list[Parts] = []
    for model in args.model:
        routing = "  ".join(f"{count}: {routing_us(SHAPES[model], count):.1f}" for count in args.tokens)
        print(f"{model} routing us: {routing}")
        for dtype in args.dtype:
            for timed in time_model(model, dtype, args.tokens, bandwidth, broken):
                (results if isinstance(timed, Result) else parts).append(timed)
            torch.cuda.empty_cache()
    print_tables(results)
    for model in dict.fromkeys(part.model for part in parts):
        print(f"\n{model} bf16: us (TFLOP/s) of each kernel alone")
        print(*(part.line() for part in parts if part.model == model), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in (*results, *parts)]))


if __name__ == "__main__":
    main()
