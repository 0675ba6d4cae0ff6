"""Llama-3.1-8B layers without attention, timed with the gate in a kernel of its own and in its product's.

    python benchmarks/gpu_layers.py [--rows 1 2 4] [--dtype bf16 fp8]

Forms: "separate" has seven kernels a layer (norm, qkv, o, norm, gate and up, activation, down); "gated" computes the
activation in the gate and up product, whose tile it names; "default" is what `gemv.default_tile` chooses. Each is
checked against "separate" first. Times are of CUDA graphs over layers whose weights do not fit the L2 cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import dataclass
from typing import Any

import torch
from gpu_matmul import CHAIN_LAYERS, DTYPES, GRAPH_S, SHAPES, random, read_bandwidth, seconds, short, unit_scales

from lamella_core.kernels import ops
from lamella_core.kernels.fused import SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton import gemv
from lamella_core.kernels.triton.gemv import VectorTile

HIDDEN = 4096
EPS = 1e-5
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
    """Weights of one layer, and what it takes to compute it in any form."""

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        self.weights = {name: random(*SHAPES[name], bound=0.02, dtype=dtype) for name in SHAPES if name != "head"}
        self.scales: Scales | None = unit_scales(dtype)
        self.scale = None if self.scales is None else self.scales.x
        self.gain = random(HIDDEN, bound=1.0, dtype=torch.bfloat16)
        self.float8_attended = random(rows, HIDDEN, bound=1.0, dtype=dtype)

    def product(self, x: torch.Tensor, name: str, **options: Any) -> torch.Tensor:
        return gemv.few_rows_matmul(x, self.weights[name], None, self.scales, **options)

    def __call__(self, form: Form, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = ops.rms_norm(hidden, self.gain, EPS, residual, self.scale)
        qkv = self.product(normed, "qkv")
        attended = self.product(qkv[:, :HIDDEN] if self.scales is None else self.float8_attended, "o")
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


def forms() -> list[Form]:
    return [Form("separate"), Form("gated"), *(Form("gated", tile) for tile in GATED_TILES)]


def prepare_one(job: tuple[str, int, Form]) -> str | None:
    """Compiles a form into Triton's cache on disk and checks it against the separate kernels; returns what is wrong."""
    dtype, rows, form = job
    try:
        torch.manual_seed(0)
        layer, x = Layer(DTYPES[dtype], rows), random(2, rows, HIDDEN, bound=1.0, dtype=torch.bfloat16)
        outs, expected = layer(form, x[0], x[1]), layer(Form("separate"), x[0], x[1])
        for out, right in zip(outs, expected, strict=True):
            error = ((out.float() - right.float()).abs().max() / right.float().abs().max()).item()
            if not error <= BOUND:
                return f"{dtype} M={rows} {form.label}: error {error:.1e} of the largest value"
    except Exception as error:  # noqa: BLE001 - reported, and the other forms are still timed
        return f"{dtype} M={rows} {form.label}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def time_forms(dtype: str, rows: int, tried: list[Form], bandwidth: float) -> None:
    """Prints microseconds per layer of each form, and the fraction of reading the weights."""
    layers = [Layer(DTYPES[dtype], rows) for _ in range(CHAIN_LAYERS)]
    first = random(2, rows, HIDDEN, bound=1.0, dtype=torch.bfloat16)
    floor = sum(w.nbytes for w in layers[0].weights.values()) / bandwidth
    cells = []
    for form in tried:
        stream = [(first[0], first[1])]

        def run(i: int, form: Form = form, stream: list[Any] = stream) -> None:
            hidden, residual = stream[0] if i else (first[0], first[1])
            stream[0] = layers[i % CHAIN_LAYERS](form, hidden, residual)

        s = min(seconds(run, CHAIN_LAYERS, 10 * GRAPH_S) for _ in range(2))
        cells.append(f"{form.label} {s * 1e6:.1f} ({floor / s:.3f})")
    print(f"{dtype} M={rows}: " + "\n        ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], choices=range(1, 5))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--processes", type=int, default=10, help="that check and compile kernels")
    args = parser.parse_args()
    jobs = [(dtype, rows, form) for dtype in args.dtype for rows in args.rows for form in forms()]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        wrong = dict(zip(jobs, pool.map(prepare_one, jobs, chunksize=1), strict=True))
    print(*filter(None, wrong.values()), sep="\n")
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; pure read {bandwidth / 1e9:.0f} GB/s")
    print("us per layer without attention (fraction of reading the weights)")
    for dtype in args.dtype:
        for rows in args.rows:
            time_forms(dtype, rows, [form for form in forms() if not wrong[dtype, rows, form]], bandwidth)
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
