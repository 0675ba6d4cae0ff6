"""Llama-3.1-8B layers of few rows, timed with more or less in the kernels of their products.

    python benchmarks/gpu_layers.py [--rows 1 2 4] [--dtype bf16 fp8] [--forms separate gated stored tiles]

Forms: "separate" has nine kernels a layer (norm, qkv, rotation and cache, attention, o, norm, gate and up, activation,
down); "gated" computes the activation in the gate and up product; "tiles" is that with tiles of its own; "stored" is
"gated" and rotates, and stores keys and values, in the qkv product. Other tiles are what `gemv.default_tile` chooses.
Each form is checked against "separate" first, and must have its bits where products have the same tiles. Times are of
CUDA graphs over layers whose weights do not fit the L2 cache: medians of replays that take turns. float8 is of weights
and cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from gpu_matmul import CHAIN_LAYERS, DTYPES, SHAPES, random, read_bandwidth, replayed, short, unit_scales

from lamella_core.context import KvPlace
from lamella_core.kernels import ops
from lamella_core.kernels.fused import RopeCacheAfter, SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv
from lamella_core.kernels.triton.attention.decode import decode_attention, decode_workspace
from lamella_core.kernels.triton.gemv import VectorTile
from lamella_core.kernels.triton.rope_cache import rope_and_cache
from lamella_core.layers.rotary import Rotation

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4096, 32, 8, 128
CONTEXT, BLOCK = 192, 64  # tokens of each sequence; per block of the cache
GRAPH_LAYERS, ROUNDS = 32, 25  # layers in a graph; replays of each form
EPS = 1e-5
FORMS = ("separate", "gated", "stored", "tiles")
BOUND = 0.02  # of the largest value after a layer: other tiles sum in another order
GATED_TILES = [VectorTile(4, 4), VectorTile(8, 4), VectorTile(4, 8), VectorTile(8, 8), VectorTile(2, 8)]


@dataclass(frozen=True)
class Form:
    """Which kernels a layer is made of."""

    name: str
    tile: VectorTile | None = None  # of the gate and up product; None: the default

    @property
    def label(self) -> str:
        return f"{self.name} {short(self.tile) if self.tile else 'default'}"


class Layer:
    """Weights and cache of one layer, and what it takes to compute it in any form."""

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        self.weights = {name: random(*SHAPES[name], bound=0.02, dtype=dtype) for name in SHAPES if name != "head"}
        self.scales: Scales | None = unit_scales(dtype)
        self.scale = None if self.scales is None else self.scales.x
        self.gain = random(HIDDEN, bound=1.0, dtype=torch.bfloat16)
        shape = (rows * CONTEXT // BLOCK, KV_HEADS, BLOCK, HEAD_DIM)
        caches = [random(*shape, bound=1.0, dtype=dtype) for _ in "kv"]
        slots = torch.arange(1, rows + 1, device="cuda") * CONTEXT - 1
        kv_scales = None if self.scales is None else torch.ones(2, device="cuda")
        angles = torch.rand(rows, HEAD_DIM // 2, device="cuda") * CONTEXT
        self.rotation = Rotation(angles.cos(), angles.sin(), HEAD_DIM, interleaved=False)
        self.place = KvPlace(caches[0], caches[1], slots, kv_scales, self.attend)
        self.tables = torch.arange(shape[0], device="cuda", dtype=torch.int32).view(rows, -1)
        self.rows = torch.arange(rows, device="cuda", dtype=torch.int32)
        self.lengths = torch.full((rows,), CONTEXT, device="cuda", dtype=torch.int32)
        self.workspace = decode_workspace(HEADS, KV_HEADS, HEAD_DIM, "cuda")

    def product(self, x: torch.Tensor, name: str, **options: Any) -> torch.Tensor:
        return gemv.few_rows_matmul(x, self.weights[name], None, self.scales, **options)

    def queries(self, form: Form, normed: torch.Tensor) -> torch.Tensor:
        """Returns rotated queries [rows, heads, D]; keys and values are stored."""
        place, rotation = self.place, self.rotation
        if form.name == "stored":
            q = self.product(normed, "qkv", after=RopeCacheAfter(HEADS, place, rotation))
            return q.view(-1, HEADS, HEAD_DIM)
        heads = self.product(normed, "qkv").view(-1, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        rope_and_cache(
            q, k, v, rotation.cos, rotation.sin, HEAD_DIM, False, place.k_cache, place.v_cache, place.slots,
            place.scales,
        )  # fmt: skip
        return q

    def attend(self, q: torch.Tensor, **_: Any) -> torch.Tensor:
        place = self.place
        return decode_attention(
            q, place.k_cache, place.v_cache, self.tables, self.rows, self.lengths, scale=HEAD_DIM**-0.5,
            max_context_len=8 * CONTEXT, kv_scales=place.scales, out_scale=self.scale, workspace=self.workspace,
        )  # fmt: skip

    def __call__(self, form: Form, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = ops.rms_norm(hidden, self.gain, EPS, residual, self.scale)
        attended = self.product(self.attend(self.queries(form, normed)).flatten(1), "o")
        normed, residual = ops.rms_norm(attended, self.gain, EPS, residual, self.scale)
        if form.name == "separate":
            inner = ops.silu_and_mul(self.product(normed, "gate_up"), self.scale)
        else:
            tile = form.tile or gated_tile(len(normed), normed.element_size())
            inner = self.product(normed, "gate_up", after=SiluGateAfter(self.scale), tile=tile)
        return self.product(inner, "down"), residual


def gated_tile(rows: int, itemsize: int) -> VectorTile:
    """The default tile, or one of vectors where the default is none."""
    tile = gemv.default_tile(rows, *SHAPES["gate_up"], itemsize)
    return tile if isinstance(tile, VectorTile) else VectorTile(4, 4)


def forms(names: list[str]) -> list[Form]:
    tiled = [Form("gated", tile) for tile in GATED_TILES] if "tiles" in names else []
    return [Form(name) for name in names if name != "tiles"] + tiled


def prepare_one(job: tuple[str, int, Form]) -> str | None:
    """Compiles a form into Triton's cache on disk and checks it against the separate kernels; returns what is wrong."""
    dtype, rows, form = job
    try:
        torch.manual_seed(0)
        layer, x = Layer(DTYPES[dtype], rows), random(2, rows, HIDDEN, bound=1.0, dtype=torch.bfloat16)
        outs, expected = results(layer, form, x), results(layer, Form("separate"), x)
        tile = gemv.default_tile(rows, *SHAPES["gate_up"], DTYPES[dtype].itemsize)
        is_same = form.tile is None and isinstance(tile, VectorTile)
        for name, out, right in zip(("output", "residual", "keys", "values"), outs, expected, strict=True):
            error = ((out - right).abs().max() / right.abs().max()).item()
            if not error <= BOUND or (error and (is_same or name in ("keys", "values"))):
                return f"{dtype} M={rows} {form.label}: {name} error {error:.1e} of the largest value"
    except Exception as error:  # noqa: BLE001 - reported, and the other forms are still timed
        return f"{dtype} M={rows} {form.label}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def results(layer: Layer, form: Form, x: torch.Tensor) -> list[torch.Tensor]:
    """Returns what a layer makes of the stream x [2, rows, HIDDEN], and its cache, as float32."""
    both = (layer.place.k_cache, layer.place.v_cache)
    for cache in both:
        cache.view(torch.uint8).fill_(0x31)  # one number everywhere
    return [out.float() for out in (*layer(form, x[0], x[1]), *both)]


def time_forms(dtype: str, rows: int, tried: list[Form], bandwidth: float) -> None:
    """Prints microseconds per layer of each form, and the fraction of reading the weights."""
    layers = [Layer(DTYPES[dtype], rows) for _ in range(CHAIN_LAYERS)]
    first = random(2, rows, HIDDEN, bound=1.0, dtype=torch.bfloat16)
    floor = sum(w.nbytes for w in layers[0].weights.values()) / bandwidth
    replays = []
    for form in tried:
        stream = [(first[0], first[1])]

        def run(i: int, form: Form = form, stream: list[Any] = stream) -> None:
            hidden, residual = stream[0] if i else (first[0], first[1])
            stream[0] = layers[i % CHAIN_LAYERS](form, hidden, residual)

        replays.append(replayed(run, GRAPH_LAYERS))
    taken: list[list[float]] = [[] for _ in tried]
    for _ in range(ROUNDS):
        for seconds, replay in zip(taken, replays, strict=True):
            seconds.append(replay(1) / GRAPH_LAYERS)
    cells = []
    for form, seconds in zip(tried, taken, strict=True):
        s = statistics.median(seconds)
        cells.append(f"{form.label} {s * 1e6:.2f} ({floor / s:.3f})")
    print(f"{dtype} M={rows}: " + "\n        ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], choices=range(1, 5))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--processes", type=int, default=10, help="that check and compile kernels")
    args = parser.parse_args()
    jobs = [(dtype, rows, form) for dtype in args.dtype for rows in args.rows for form in forms(args.forms)]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        wrong = dict(zip(jobs, pool.map(prepare_one, jobs, chunksize=1), strict=True))
    print(*filter(None, wrong.values()), sep="\n")
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; pure read {bandwidth / 1e9:.0f} GB/s")
    print("us per layer (fraction of reading the weights)")
    for dtype in args.dtype:
        for rows in args.rows:
            time_forms(dtype, rows, [form for form in forms(args.forms) if not wrong[dtype, rows, form]], bandwidth)
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
