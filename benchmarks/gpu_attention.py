"""Triton attention kernels on one GPU: checked against float32 torch, then timed by tile, batch, context and cache.

    python benchmarks/gpu_attention.py [--only decode prefill] [--quick] [--json results.json]

A layer of the Llama-3.1-8B shape (32 heads, 8 key/value heads of 128). "whole" is prompts over their own keys, in bf16
and without a cache, as a float8 cache's first chunks are computed. First every tile is compiled and checked, in
worker processes, on random data; one that fails is named and left out. Then times: launches of a CUDA graph, each on
other cache blocks, so that keys come from memory and not from the L2 cache; median of several replays. Decoding counts
bytes of keys and values over time, as a fraction of 3.0 TB/s; prompts count 4 D FLOPs per query, head and visible key.
The last two tables are for choosing: the best tile per case, and the mean rank of each tile.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lamella_core.kernels.triton.attention.common import num_processors
from lamella_core.kernels.triton.attention.decode import Split, decode_attention, decode_workspace
from lamella_core.kernels.triton.attention.decode_plan import Tile as DecodeTile
from lamella_core.kernels.triton.attention.decode_plan import choose_split
from lamella_core.kernels.triton.attention.decode_plan import choose_tile as choose_decode_tile
from lamella_core.kernels.triton.attention.prefill import prefill_attention, ragged_attention
from lamella_core.kernels.triton.attention.prefill_plan import Tile as PrefillTile
from lamella_core.kernels.triton.attention.prefill_plan import choose_tile as choose_prefill_tile
from lamella_core.kernels.triton.launch import next_power_of_2

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
BANDWIDTH = 3.0e12  # bytes/s, device-to-device copy on an H100
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
POOL_BYTES = 6 * 2**30  # keys and values that a layer's cache holds here
COLD_BYTES = 256 * 2**20  # launches in a row read at least so much before they come back to the same keys
MOST_BYTES = 5 * 2**30  # read by one launch

DECODE_TILES = {
    "bf16": [(64, 4, 3), (32, 4, 4), (32, 2, 3), (32, 1, 3), (64, 4, 4), (128, 4, 2)],
    "fp8": [(64, 4, 3), (128, 4, 3), (64, 2, 3), (32, 1, 4), (64, 4, 4), (128, 4, 2)],
}
SPLIT_TILES = {"bf16": {(64, 4, 3), (32, 2, 3)}, "fp8": {(64, 4, 3), (128, 4, 3)}}  # tried with several splits
PREFILL_TILES = {
    "bf16": [(64, 64, 4, 3), (64, 32, 4, 3), (128, 128, 8, 3), (64, 32, 4, 4), (128, 32, 4, 3), (128, 64, 8, 3)],
    "fp8": [(64, 128, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3)],
}
KERNELS = ("decode", "prefill", "whole")
PREFILL_TILES["whole"] = PREFILL_TILES["bf16"]
BATCHES, CONTEXTS = (1, 4, 8, 16, 32, 64, 256, 1024, 2048), (128, 256, 1024, 4096)
TRIED_PART = 32  # least keys of parts, where other splits than the usual are tried
# name -> (query length, context length) of each sequence
PROMPTS = {
    "1 x 2048": [(2048, 2048)],
    "4 x 2048": [(2048, 2048)] * 4,
    "64 x 128": [(128, 128)] * 64,
    "8 x 1000": [(1000, 1000)] * 8,
    "1 x 8192": [(8192, 8192)],
    "512 after 7680": [(512, 8192)],
    "4096 + 32 x 128": [(4096, 4096)] + [(128, 128)] * 32,
    "20 after 2000": [(20, 2020)],
}


@dataclass(frozen=True)
class Variant:
    """What is compiled: a kernel for a cache, a block size and a tile."""

    kernel: str  # "decode", "prefill" or "whole"
    cache: str  # "-" where none is read
    page: int
    tile: tuple[int, ...]


class Layer:
    """Random caches of one layer in blocks, and tables that lead to other blocks each turn."""

    def __init__(self, cache: str, page: int, pool_bytes: int) -> None:
        self.page = page
        self.token_bytes = 2 * KV_HEADS * DIM * CACHES[cache].itemsize
        self.num_blocks = pool_bytes // (self.token_bytes * page)
        shape = (self.num_blocks, KV_HEADS, page, DIM)
        self.k, self.v = (torch.empty(shape, dtype=CACHES[cache], device="cuda") for _ in range(2))
        for x in (self.k, self.v):
            for part in x.split(max(1, 2**27 // x[0].numel())):
                part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
        self.scales = torch.tensor([0.9, 1.1], device="cuda") if cache == "fp8" else None

    def tables(self, lengths: list[int], turns: int) -> Tensor:
        """Block tables [turns * S, B], no block twice in a turn."""
        blocks = [-(-length // self.page) for length in lengths]
        tables = torch.zeros(turns * len(lengths), max(blocks), dtype=torch.int32, device="cuda")
        order = torch.randperm(self.num_blocks, device="cuda").int()
        at = 0
        for row, count in enumerate(blocks * turns):
            if at + count > self.num_blocks:
                at = 0
            tables[row, :count] = order[at : at + count]
            at += count
        return tables


def reference(layer: Layer, q: Tensor, table: Tensor, length: int) -> Tensor:
    """Causal attention of q [Q, Hq, D], the last of ``length`` tokens, in float32: [Q, Hq, D]."""
    scales = (1.0, 1.0) if layer.scales is None else layer.scales.tolist()
    keys, values = (
        (x[table.long()].float() * scale).transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(HEADS // KV_HEADS, 1)
        for x, scale in zip((layer.k, layer.v), scales)
    )
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * SCALE
    positions = torch.arange(length - q.shape[0], length, device="cuda")
    hidden = torch.arange(length, device="cuda")[None, :] > positions[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def gathered(layer: Layer, tables: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Cached keys and values of sequences, packed: each [T, Hkv, D]."""
    k, v = (
        torch.cat([x[table.long()].transpose(1, 2).flatten(0, 1)[:n] for table, n in zip(tables, lengths)])
        for x in (layer.k, layer.v)
    )
    return k, v


def check(variant: Variant) -> tuple[Variant, str | None, float]:
    """Compiles a variant and compares it with the reference; returns what is wrong, and the largest error."""
    torch.manual_seed(0)
    layer = Layer("bf16" if variant.kernel == "whole" else variant.cache, variant.page, 2**26)
    lengths = [1, 17, 64, 200, 777, 500]
    queries = {"decode": [1] * 6, "whole": lengths, "prefill": [1, 17, 64, 130, 300, 5]}[variant.kernel]
    tables = layer.tables(lengths, 1)
    q = torch.randn(sum(queries), HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(6, dtype=torch.int32, device="cuda")
    context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    given = (q, layer.k, layer.v, tables, rows)
    try:
        if variant.kernel == "decode":
            tile = DecodeTile(*variant.tile)
            keywords = {"scale": SCALE, "kv_scales": layer.scales, "tile": tile, "max_context_len": 1024}
            results = [
                decode_attention(*given, context, split=split, **keywords) for split in (Split(1, 4096), Split(4, 64))
            ]
        elif variant.kernel == "whole":
            k, v = gathered(layer, tables, lengths)
            whole = PrefillTile(*variant.tile)
            results = [ragged_attention(q, k, v, starts, max_query_len=777, scale=SCALE, tile=whole)]
        else:
            keywords = {"scale": SCALE, "kv_scales": layer.scales, "tile": PrefillTile(*variant.tile)}
            results = [prefill_attention(*given, starts, context, max_query_len=300, **keywords)]
        expected = torch.cat(
            [reference(layer, part, table, n) for part, table, n in zip(q.split(queries), tables, lengths)]
        )
        worst = max((result.float() - expected).abs().max().item() for result in results)
    except Exception as error:  # noqa: BLE001 - a tile that the device cannot run is reported, not fatal
        return variant, f"{type(error).__name__}: {str(error)[:160]}", math.inf
    return variant, None if worst < 0.03 else "differs from the reference", worst


def median_microseconds(launch: Callable[[int], object], turns: int, replays: int = 7) -> float:
    """Median time of one of ``turns`` launches in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for turn in range(turns):
                launch(turn)
        times = []
        for _ in range(replays + 1):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) * 1000 / turns)
    return statistics.median(times[1:])


@dataclass(frozen=True)
class Result:
    """A time, and bytes or FLOPs per second in units of 1e9 or 1e12."""

    kernel: str
    cache: str
    page: int
    case: str
    tile: tuple[int, ...]
    parts: int
    is_default: bool
    microseconds: float
    rate: float


def splits(num_seqs: int, context: int, every: bool) -> list[Split]:
    """The usual split, and beside it others where the batch is small."""
    usual = choose_split(num_seqs, KV_HEADS, context, num_processors(torch.device("cuda")))
    if not every or num_seqs > 64:
        return [usual]
    room = 16 * num_processors(torch.device("cuda")) // (num_seqs * KV_HEADS)
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= min(room, context // TRIED_PART)]
    return [usual, *(Split(n, TRIED_PART) for n in counts)]


class DecodeBatch:
    """One query for each of some sequences of at most ``bound`` keys; each turn leads to other blocks."""

    def __init__(self, layer: Layer, lengths: list[int], bound: int) -> None:
        self.layer, self.longest = layer, bound
        self.num_bytes = sum(lengths) * layer.token_bytes
        self.turns = min(64, max(4, -(-COLD_BYTES // self.num_bytes)))
        self.tables = layer.tables(lengths, self.turns)
        self.rows = torch.arange(len(self.tables), dtype=torch.int32, device="cuda").split(len(lengths))
        self.context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.q = torch.randn(len(lengths), HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.workspace = decode_workspace(HEADS, KV_HEADS, DIM, "cuda")

    def launch(self, tile: tuple[int, ...], split: Split, turn: int) -> None:
        decode_attention(
            self.q, self.layer.k, self.layer.v, self.tables, self.rows[turn], self.context, scale=SCALE,
            max_context_len=self.longest, kv_scales=self.layer.scales, workspace=self.workspace, out=self.out,
            tile=DecodeTile(*tile), split=split,
        )  # fmt: skip


def time_decode(layer: Layer, cache: str, tiles: list[tuple[int, ...]], quick: bool) -> list[Result]:
    """Times each tile on each batch and context, and other splits with the usual tile."""
    results = []
    processors = num_processors(torch.device("cuda"))
    mixed = [int(128 + 3968 * i / 255) for i in range(256)]
    cases = [(f"{s} x {c}", [c] * s, c) for s in BATCHES for c in CONTEXTS] + [("256 x 128..4096", mixed, 4096)]
    cases += [(f"{s} x 128 of 131072", [128] * s, 131072) for s in (1, 16, 64)]
    for case, lengths, bound in cases:
        if sum(lengths) * layer.token_bytes > MOST_BYTES or (quick and len(lengths) in (4, 16, 2048)):
            continue
        batch = DecodeBatch(layer, lengths, bound)
        programs = len(lengths) * KV_HEADS
        usual_tile = choose_decode_tile(DIM, CACHES[cache].itemsize, programs, batch.longest, processors)
        for tile in tiles:
            for split in splits(len(lengths), batch.longest, tile in SPLIT_TILES[cache]):
                spent = median_microseconds(functools.partial(batch.launch, tile, split), batch.turns)
                is_default = DecodeTile(*tile) == usual_tile and split.least_keys != TRIED_PART
                rate = batch.num_bytes / spent / 1e3
                results.append(Result("decode", cache, layer.page, case, tile, split.parts, is_default, spent, rate))
    return results


class PromptBatch:
    """Chunks of prompts."""

    def __init__(self, layer: Layer, sequences: list[tuple[int, int]]) -> None:
        queries, lengths = [q for q, _ in sequences], [n for _, n in sequences]
        self.layer, self.longest = layer, max(queries)
        self.tables = layer.tables(lengths, 1)
        fused = torch.randn(sum(queries), HEADS + 2 * KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.q, *self.own = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # parts of one product, as in a model
        self.out = torch.empty(self.q.shape, device="cuda", dtype=torch.bfloat16)
        self.rows = torch.arange(len(lengths), dtype=torch.int32, device="cuda")
        self.starts = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
        self.context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.flops = sum(4 * DIM * HEADS * (n * (length - n) + n * (n + 1) / 2) for n, length in sequences)

    def launch(self, tile: tuple[int, ...], turn: int) -> None:
        prefill_attention(
            self.q, self.layer.k, self.layer.v, self.tables, self.rows, self.starts, self.context, scale=SCALE,
            max_query_len=self.longest, kv_scales=self.layer.scales, out=self.out, tile=PrefillTile(*tile),
        )  # fmt: skip

    def launch_whole(self, tile: tuple[int, ...], turn: int) -> None:
        k, v = self.own
        ragged_attention(
            self.q, k, v, self.starts, scale=SCALE, max_query_len=self.longest, out=self.out, tile=PrefillTile(*tile)
        )


def time_prefill(layer: Layer, kernel: str, cache: str, tiles: list[tuple[int, ...]]) -> list[Result]:
    """Times each tile on each mix of prompts; "whole": on those that are whole."""
    results = []
    for case, sequences in PROMPTS.items():
        if kernel == "whole" and any(count < length for count, length in sequences):
            continue
        batch = PromptBatch(layer, sequences)
        most_rows = next_power_of_2(batch.longest * HEADS // KV_HEADS)
        itemsize = 2 if kernel == "whole" else CACHES[cache].itemsize
        most_keys = next_power_of_2(max(length for _, length in sequences))
        usual = choose_prefill_tile(DIM, 2, itemsize, most_rows, most_keys)
        launch = batch.launch_whole if kernel == "whole" else batch.launch
        for tile in tiles:
            spent = median_microseconds(functools.partial(launch, tile), 4)
            is_default = PrefillTile(*tile) == usual
            rate = batch.flops / spent / 1e6
            results.append(Result(kernel, cache, layer.page, case, tile, 1, is_default, spent, rate))
    return results


def show(results: list[Result]) -> None:
    """Prints the best and the default per case, then how the tiles compare over all cases."""
    cases: dict[tuple[str, str, int, str], list[Result]] = defaultdict(list)
    for result in results:
        cases[result.kernel, result.cache, result.page, result.case].append(result)
    loss: dict[tuple[str, str, int], dict[tuple[int, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    print(f"{'kernel':8}{'cache':6}{'P':>4} {'case':22}{'best us':>9} {'tile':18}{'parts':>5} {'rate':>7} {'of 3.0':>7}"
          f"{'default us':>11}{'parts':>6}{'rate':>7}")  # fmt: skip
    for (kernel, cache, page, case), found in cases.items():
        best = min(found, key=lambda r: r.microseconds)
        usual = next((r for r in found if r.is_default), None)
        share = f"{best.rate * 1e9 / BANDWIDTH:7.2f}" if kernel == "decode" else f"{'-':>7}"
        ours = f"{usual.microseconds:11.1f}{usual.parts:6}{usual.rate:7.0f}" if usual else ""
        print(f"{kernel:8}{cache:6}{page:4} {case:22}{best.microseconds:9.1f} {best.tile!s:18}{best.parts:5} "
              f"{best.rate:7.0f} {share}{ours}")  # fmt: skip
        for tile in {r.tile for r in found}:
            least = min(r.microseconds for r in found if r.tile == tile)
            loss[kernel, cache, page][tile].append(math.log(least / best.microseconds))
    print(
        "\nrates are GB/s and TFLOP/s; below: time over the best, each tile with its best split, geometric mean (worst)"
    )
    for (kernel, cache, page), tiles in loss.items():
        for tile, logs in sorted(tiles.items(), key=lambda item: sum(item[1])):
            mean, worst = math.exp(statistics.mean(logs)), math.exp(max(logs))
            print(f"{kernel:8}{cache:6}{page:4} {tile!s:18} {mean:6.3f} ({worst:5.2f})")


def checked(variants: list[Variant], workers: int) -> set[Variant]:
    """Compiles and checks all variants in other processes; prints what fails, returns the rest."""
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        outcomes = list(pool.map(check, variants))
    for variant, wrong, worst in outcomes:
        if wrong is not None:
            print(f"left out: {variant}: {wrong} (error {worst:.3g})", flush=True)
    good = {variant for variant, wrong, _ in outcomes if wrong is None}
    largest = max((worst for variant, _, worst in outcomes if variant in good), default=math.nan)
    print(f"{len(good)} of {len(variants)} variants agree with float32, largest difference {largest:.4f}; "
          f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--quick", action="store_true", help="fewer batches, blocks of 64 tokens only")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--json", type=Path, help="where to write every time")
    args = parser.parse_args()
    pages = (64,) if args.quick else (64, 32)
    variants = [
        Variant(kernel, cache, page, tile)
        for cache in CACHES
        for page in pages
        for kernel in args.only
        if kernel != "whole"
        for tile in (DECODE_TILES if kernel == "decode" else PREFILL_TILES)[cache]
    ]
    if "whole" in args.only:
        variants += [Variant("whole", "-", 64, tile) for tile in PREFILL_TILES["whole"]]
    good = checked(variants, args.workers)
    results: list[Result] = []
    begin = time.perf_counter()
    for cache in CACHES:
        for page in pages:
            layer = Layer(cache, page, POOL_BYTES)
            tiles = {kernel: [v.tile for v in variants if v in good and (v.kernel, v.cache, v.page) == key]
                     for kernel in args.only for key in [(kernel, cache, page)]}  # fmt: skip
            if "decode" in args.only:
                results += time_decode(layer, cache, tiles["decode"], args.quick)
            if "prefill" in args.only:
                results += time_prefill(layer, "prefill", cache, tiles["prefill"])
            if "whole" in args.only and (cache, page) == ("bf16", 64):
                whole = [v.tile for v in variants if v in good and v.kernel == "whole"]
                results += time_prefill(layer, "whole", "-", whole)
            del layer
            torch.cuda.empty_cache()
            print(f"{cache}, blocks of {page}: {time.perf_counter() - begin:.0f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results]))
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    show(results)


if __name__ == "__main__":
    main()
