"""CUDA matmul kernels checked against float64, then timed on the five products of Llama-3.1-8B, in bf16 and float8.

    python benchmarks/gpu_matmul.py [--rows 1 4 16 512] [--dtype bf16 fp8] [--json FILE]

A time is that of one launch in a CUDA graph that goes round over so many copies of the weight that the L2 cache holds
none when its turn comes. GB/s counts the weight, the inputs and the outputs. The last part is a chain of decoder layers
without attention (norm, qkv, o, norm, gate and up, activation, down) beside the time to read the weights, at the
bandwidth of a pure read that is measured first. Tables come last; --json keeps every number.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lamella_core.kernels import gpu_matmul, ops
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv, launch

SHAPES = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096),
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
COLD_BYTES = 192 << 20  # weights that go round; four times an H100's L2 cache
GRAPH_S = 2e-3  # of replays that are timed
CHAIN_LAYERS = 4
LIBRARY = {"bf16": "cublas", "fp8": "cublas_fp8"}

Tile = gemv.VectorTile | gemv.MatrixTile
VECTOR_TILES = [
    gemv.VectorTile(n, warps) for n, warps in ((2, 4), (4, 4), (8, 4), (16, 4), (2, 8), (4, 8), (8, 8), (8, 2), (4, 2))
]


def tiles(rows: int, itemsize: int) -> list[Tile]:
    """Tile shapes worth trying for so many rows."""
    wide = 128 // itemsize
    matrix: list[Tile] = [
        gemv.MatrixTile(16, wide, 4, 4), gemv.MatrixTile(16, wide, 4, 6), gemv.MatrixTile(32, wide, 4, 3),
        gemv.MatrixTile(32, wide, 4, 4), gemv.MatrixTile(64, wide, 4, 3), gemv.MatrixTile(16, wide, 8, 3),
        gemv.MatrixTile(16, 2 * wide, 2, 4),
    ]  # fmt: skip
    if rows > gemv.MOST_VECTOR_ROWS:
        return matrix
    vector = [tile for tile in VECTOR_TILES if tile.block_n * rows <= 32]
    return [*vector, *matrix[:1]]


@dataclass(frozen=True)
class Product:
    """Inputs of one product, and enough copies of its weight."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    scales: Scales | None

    @property
    def num_bytes(self) -> int:
        (m, _), w = self.x.shape, self.weights[0]
        return w.nbytes + self.x.nbytes + 2 * m * w.shape[0]


def random(*shape: int, bound: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).uniform_(-bound, bound).to(dtype)


def make_weights(n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    copies = -(-COLD_BYTES // (n * k * dtype.itemsize))
    return [random(n, k, bound=0.5, dtype=dtype) for _ in range(copies)]


def unit_scales(dtype: torch.dtype) -> Scales | None:
    if dtype != torch.float8_e4m3fn:
        return None
    one = torch.ones((), device="cuda")
    return Scales(one, one, torch.bfloat16)


def seconds(run: Callable[[int], object], launches: int, least_s: float = GRAPH_S) -> float:
    """Seconds of one launch: ``run(i)`` for each i is captured once and replayed."""
    replay = replayed(run, launches)
    first = min(replay(1), replay(1))
    return replay(max(2, min(200, int(least_s / first)))) / launches


def replayed(run: Callable[[int], object], launches: int) -> Callable[[int], float]:
    """Captures ``run(i)`` for each i; returns what replays that so many times and tells the seconds of one replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(launches):
            run(index)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    return replay


def read_bandwidth() -> float:
    """Bytes per second of the sum of 4 GiB."""
    data = torch.ones(1 << 30, device="cuda")
    return data.nbytes / seconds(lambda _: data.sum(), 2)


def library_call(name: str, product: Product) -> Callable[[int], object]:
    kernel = {kernel.name: kernel for kernel in gpu_matmul.gpu_kernels()}[name]
    weights = product.weights
    n = weights[0].shape[0]
    return lambda i: kernel(product.x, weights[i % len(weights)], n, None, product.scales)


def tile_call(tile: Tile, product: Product) -> Callable[[int], object]:
    weights = product.weights
    return lambda i: gemv.few_rows_matmul(product.x, weights[i % len(weights)], None, product.scales, tile=tile)


# Checks ---------------------------------------------------------------------------------------------------------------


def check(name: str, out: torch.Tensor, expected: torch.Tensor, bound: float) -> str | None:
    """Returns what is wrong with a result, or None."""
    error = ((out.double() - expected).abs().max() / expected.abs().max()).item()
    return None if error <= bound else f"{name}: error {error:.2e} of the largest value, allowed {bound:.2e}"


CheckJob = tuple[int, int, int, torch.dtype]
CHECKS: list[CheckJob] = [
    (m, n, k, dtype)
    for n, k in ((4096, 14336), (1008, 1072))
    for m in (1, 2, 3, 4, 5, 8, 16, 17, 300)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
]


def check_job(job: CheckJob) -> list[str]:
    """Compares every kernel with float64; returns what is wrong."""
    return check_product(*job)


def check_product(m: int, n: int, k: int, dtype: torch.dtype) -> list[str]:
    is_fp8 = dtype == torch.float8_e4m3fn
    x, w = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, k, device="cuda").to(dtype)
    kinds: list[Scales | None] = [None]
    if is_fp8:
        x_all, w_all = torch.tensor(0.3, device="cuda"), torch.tensor(0.7, device="cuda")
        x_rows, w_outs = torch.rand(m, 1, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5
        kinds = [Scales(x_all, w_all, torch.bfloat16), Scales(x_rows, w_outs, torch.bfloat16)]
        kinds += [Scales(x_all, w_outs, torch.bfloat16), Scales(x_rows, w_outs, torch.float16)]
    wrong = []
    plain = x.double() @ w.double().t()
    for scales in kinds:
        out_dtype = dtype if scales is None else scales.out_dtype
        bias = torch.randn(n, device="cuda").to(out_dtype)
        expected = (plain if scales is None else plain * scales.x.double() * scales.w.double()) + bias.double()
        bound = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 3e-6}[out_dtype] + 1e-3 * is_fp8
        for kernel in gpu_matmul.gpu_kernels():
            if not kernel.available(dtype, n, k) or m > (kernel.most_rows or m):
                continue
            name = f"{kernel.name} {dtype} M={m} N={n} K={k}"
            try:
                wrong.append(check(name, kernel(x, w, n, bias, scales), expected, bound))
            except Exception as error:  # noqa: BLE001 - one kernel's failure must not hide the others' results
                wrong.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return [message for message in wrong if message]


# Compiling ------------------------------------------------------------------------------------------------------------


def compile_one(job: tuple[str, int, int, Tile]) -> str | None:
    """Compiles one kernel into Triton's cache on disk, by running it on a small weight."""
    dtype_name, rows, k, tile = job
    dtype = DTYPES[dtype_name]
    try:
        x, w = torch.zeros(rows, k, device="cuda").to(dtype), torch.zeros(64, k, device="cuda").to(dtype)
        gemv.few_rows_matmul(x, w, None, unit_scales(dtype), tile=tile)
    except Exception as error:  # noqa: BLE001 - reported, and that tile is left out
        return f"{job}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def compile_jobs(rows: list[int], dtypes: list[str]) -> list[tuple[str, int, int, Tile]]:
    jobs: dict[tuple[str, int, int, Tile], None] = {}
    for dtype in dtypes:
        for m in (m for m in rows if m <= gemv.MOST_ROWS):
            for tile in [*tiles(m, DTYPES[dtype].itemsize), *chain_tiles(m, DTYPES[dtype].itemsize)]:
                same_code = m if isinstance(tile, gemv.VectorTile) else gemv.MOST_ROWS
                jobs.update(dict.fromkeys((dtype, same_code, k, tile) for k in (4096, 14336)))
    return list(jobs)


def prepare(rows: list[int], dtypes: list[str], processes: int) -> list[str]:
    """Checks all kernels and compiles those that will be timed, in several processes; returns what is wrong."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        compiled = pool.imap_unordered(compile_one, compile_jobs(rows, dtypes), chunksize=2)
        wrong = [message for found in pool.imap_unordered(check_job, CHECKS) for message in found]
        return [*wrong, *filter(None, compiled)]


# Timing ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    dtype: str
    shape: str
    rows: int
    kernel: str  # a name, or a tile
    microseconds: float
    gb_per_s: float
    tflop_per_s: float


def short(tile: Tile) -> str:
    if isinstance(tile, gemv.VectorTile):
        return f"v{tile.block_n}x{tile.num_warps}" + (f"+{tile.ahead}" if tile.ahead else "")
    return f"m{tile.block_n}x{tile.block_k}x{tile.num_warps}s{tile.num_stages}"


def time_shape(dtype_name: str, shape: str, rows: list[int]) -> Iterator[Result]:
    n, k = SHAPES[shape]
    dtype = DTYPES[dtype_name]
    weights = make_weights(n, k, dtype)
    for m in rows:
        if shape == "head" and m > 1024:
            continue
        product = Product(random(m, k, bound=1.0, dtype=dtype), weights, unit_scales(dtype))
        calls = {LIBRARY[dtype_name]: library_call(LIBRARY[dtype_name], product)}
        if m <= gemv.MOST_ROWS:
            calls |= {short(tile): tile_call(tile, product) for tile in tiles(m, dtype.itemsize)}
        launches = len(weights) if m > 64 else max(4, len(weights))
        for name, call in calls.items():
            try:
                s = seconds(call, launches)
            except Exception as error:  # noqa: BLE001 - a tile that does not fit the GPU is reported and left out
                print(f"{dtype_name} {shape} M={m} {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            yield Result(dtype_name, shape, m, name, s * 1e6, product.num_bytes / s / 1e9, 2e-12 * m * n * k / s)


def chain_tiles(rows: int, itemsize: int) -> list[Tile]:
    """Tiles that the chain of layers is timed with: with and without prefetching while the kernel before runs."""
    if rows > gemv.MOST_VECTOR_ROWS:
        return [gemv.MatrixTile(32, 128 // itemsize, 4, 4, ahead) for ahead in (0, 512)]
    block = 4 if rows < 4 else 2
    return [gemv.VectorTile(n, 4, ahead) for n in (block, 2 * block) for ahead in (0, 2048, 8192)]


def time_chain(dtype_name: str, rows: int, bandwidth: float) -> Iterator[tuple[str, float, float]]:
    """Yields (kernel, microseconds per layer, fraction of the time to read the weights)."""
    dtype = DTYPES[dtype_name]
    names = ("qkv", "o", "gate_up", "down")
    layers = [[random(*SHAPES[name], bound=0.02, dtype=dtype) for name in names] for _ in range(CHAIN_LAYERS)]
    scales = unit_scales(dtype)
    out_scale = None if scales is None else scales.x
    gain = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    hidden = random(rows, 4096, bound=1.0, dtype=torch.bfloat16)
    floor = sum(w.nbytes for w in layers[0]) / bandwidth

    def run_layer(weights: list[torch.Tensor], matmul: Callable[..., torch.Tensor]) -> None:
        normed, total = ops.rms_norm(hidden, gain, 1e-5, hidden, out_scale)
        qkv = matmul(normed, weights[0], None, scales)
        attended = qkv[:, :4096] if out_scale is None else normed
        normed, _ = ops.rms_norm(matmul(attended, weights[1], None, scales), gain, 1e-5, total, out_scale)
        matmul(ops.silu_and_mul(matmul(normed, weights[2], None, scales), out_scale), weights[3], None, scales)

    library: Callable[..., torch.Tensor] = gpu_matmul.cublas if scales is None else gpu_matmul.cublas_fp8
    calls = {LIBRARY[dtype_name]: library, "default": gemv.few_rows_matmul}
    for tile in chain_tiles(rows, dtype.itemsize):
        calls[short(tile)] = functools.partial(gemv.few_rows_matmul, tile=tile)
    for name, matmul in calls.items():
        s = seconds(lambda i, matmul=matmul: run_layer(layers[i % CHAIN_LAYERS], matmul), CHAIN_LAYERS, 10 * GRAPH_S)
        yield name, s * 1e6, floor / s


# Tables ---------------------------------------------------------------------------------------------------------------


def print_tables(results: list[Result]) -> None:
    for dtype in dict.fromkeys(r.dtype for r in results):
        mine = [r for r in results if r.dtype == dtype]
        print(f"\n{dtype}, few rows: microseconds, GB/s of the library; then the three fastest tiles")
        for shape in SHAPES:
            for m in sorted({r.rows for r in mine if r.rows <= gemv.MOST_ROWS}):
                at = [r for r in mine if (r.shape, r.rows) == (shape, m)]
                ranked = sorted((r for r in at if r.kernel not in LIBRARY.values()), key=lambda r: r.microseconds)
                cells = [r for r in at if r.kernel in LIBRARY.values()] + ranked[:3]
                line = "  ".join(f"{r.kernel:>10} {r.microseconds:6.1f} {r.gb_per_s:5.0f}" for r in cells)
                print(f"{shape:>8} M={m:<3} {line}")
        print(f"{dtype}, more rows, library: microseconds / TFLOP/s")
        for shape in SHAPES:
            cells = [r for r in mine if r.shape == shape and r.rows > gemv.MOST_ROWS]
            print(f"{shape:>8} " + "  ".join(f"{r.rows}: {r.microseconds:.0f}/{r.tflop_per_s:.0f}" for r in cells))


def print_ranking(results: list[Result]) -> None:
    """Prints the sum over a layer's four products for each tile."""
    for dtype in dict.fromkeys(r.dtype for r in results):
        for m in sorted({r.rows for r in results if r.rows <= gemv.MOST_ROWS}):
            sums: dict[str, list[float]] = {}
            for r in results:
                if (r.dtype, r.rows) == (dtype, m) and r.shape != "head":
                    sums.setdefault(r.kernel, []).append(r.microseconds)
            whole = sorted((sum(times), name) for name, times in sums.items() if len(times) == len(SHAPES) - 1)
            print(f"{dtype} M={m}: us per layer: " + "  ".join(f"{name} {us:.0f}" for us, name in whole[:8]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--json", type=Path, help="write every number there")
    parser.add_argument("--processes", type=int, default=10, help="that check and compile kernels")
    args = parser.parse_args()
    began = time.perf_counter()
    wrong = prepare(args.rows, args.dtype, args.processes)
    print(*wrong, sep="\n")
    print(f"compiled and checked after {time.perf_counter() - began:.0f} s; PDL {launch.use_pdl()}")
    bandwidth = read_bandwidth()
    results = [r for d in args.dtype for shape in SHAPES for r in time_shape(d, shape, args.rows)]
    few = [m for m in args.rows if m in (1, 4, 16)]
    chains = [(d, m, *row) for d in args.dtype for m in few for row in time_chain(d, m, bandwidth)]
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if args.json:
        found = {**versions, "read_gb_per_s": bandwidth / 1e9, "results": [vars(r) for r in results], "chains": chains}
        args.json.write_text(json.dumps(found, indent=1))
    print_tables(results)
    print_ranking(results)
    print(f"\n{versions}; pure read {bandwidth / 1e9:.0f} GB/s")
    print("layers without attention: us per layer (fraction of reading the weights)")
    for d, m in dict.fromkeys((c[0], c[1]) for c in chains):
        cells = [f"{name} {us:.0f} ({part:.2f})" for cd, cm, name, us, part in chains if (cd, cm) == (d, m)]
        print(f"{d} M={m}: " + "  ".join(cells))
    print(f"{time.perf_counter() - began:.0f} s; {len(wrong)} wrong results")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
