"""The Triton kernels between matrix products and attention: each checked against its reference, then timed, on a GPU.

    python benchmarks/gpu_glue.py [--rows 1 16 128 1024 8192] [--kernels norm rope ...] [--report-json FILE]

Shapes are those of Llama-3.1-8B in bfloat16. A time is that of one call among --repeat equal calls in one CUDA graph,
the median of --trials replays: launches as in a captured step, inputs warm in the L2 cache where they fit. GB/s counts
every input and output once. "differ" is the fraction of values that are not those of the reference, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.triton import activation, norm, quantize, rope_cache, sampling

HIDDEN, INNER, Q_HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
TOKENS_PER_BLOCK = 64
MOST_LOGIT_ROWS = 1024
MOST_DIFFERING = 0.005
DEVICE = "cuda"
FLOAT8 = torch.float8_e4m3fn

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One kernel on inputs of some number of rows."""

    call: Callable[[], Tensors]
    expected: Callable[[], Tensors] | None
    num_bytes: int


@dataclass(frozen=True)
class Result:
    kernel: str
    rows: int
    microseconds: float
    gb_per_s: float
    differing: float | None


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def to_float8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-448, 448).to(FLOAT8)


def norm_case(rows: int, float8: bool = False) -> Case:
    x, residual, weight = normal(rows, HIDDEN), normal(rows, HIDDEN), normal(HIDDEN)
    scale = torch.tensor(0.02, device=DEVICE) if float8 else None

    def expected() -> Tensors:
        normed, total = reference.rms_norm(x, weight, 1e-5, residual)
        return (normed if scale is None else to_float8(normed, scale)), total

    num_bytes = rows * HIDDEN * (2 * 3 + (1 if float8 else 2)) + 2 * HIDDEN
    return Case(lambda: norm.rms_norm(x, weight, 1e-5, residual, scale), expected, num_bytes)


def silu_case(rows: int, float8: bool = False) -> Case:
    gate_up = normal(rows, 2 * INNER)
    scale = torch.tensor(0.02, device=DEVICE) if float8 else None

    def expected() -> Tensors:
        y = reference.silu_and_mul(gate_up)
        return (y if scale is None else to_float8(y, scale),)

    num_bytes = rows * INNER * (4 + (1 if float8 else 2))
    return Case(lambda: (activation.silu_and_mul(gate_up, scale),), expected, num_bytes)


def quantize_case(rows: int) -> Case:
    x, scale = normal(rows, HIDDEN), torch.tensor(0.02, device=DEVICE)
    return Case(lambda: (quantize.quantize_fp8(x, scale),), lambda: (to_float8(x, scale),), rows * HIDDEN * 3)


def per_token_case(rows: int) -> Case:
    x = normal(rows, HIDDEN)

    def expected() -> Tensors:
        largest = x.float().abs().amax(1, keepdim=True)
        scales = largest / torch.full_like(largest, 448.0)  # by a number, PyTorch multiplies by its reciprocal
        return to_float8(x, scales), scales

    return Case(lambda: quantize.quantize_fp8_per_token(x), expected, rows * (HIDDEN * 3 + 4))


def rope_case(rows: int, float8: bool = False) -> Case:
    """Timed calls rotate the same queries again and again, which keeps their size; the check looks at one call."""
    heads = Q_HEADS + 2 * KV_HEADS
    fused = normal(rows, heads, HEAD_DIM)
    q, k, v = fused[:, :Q_HEADS], fused[:, Q_HEADS : Q_HEADS + KV_HEADS], fused[:, Q_HEADS + KV_HEADS :]
    angles = torch.rand(rows, HEAD_DIM // 2, device=DEVICE) * 100
    cos, sin = angles.cos(), angles.sin()
    blocks = -(-rows // TOKENS_PER_BLOCK) + 1
    shape = (blocks, KV_HEADS, TOKENS_PER_BLOCK, HEAD_DIM)
    caches = [torch.zeros(shape, device=DEVICE).to(FLOAT8 if float8 else torch.bfloat16) for _ in "kv"]
    slots = torch.randperm(blocks * TOKENS_PER_BLOCK, device=DEVICE)[:rows]
    scales = torch.tensor([0.05, 0.03], device=DEVICE) if float8 else None
    first = fused.clone()

    def call() -> Tensors:
        rope_cache.rope_and_cache(q, k, v, cos, sin, HEAD_DIM, False, *caches, slots, scales)
        return q, *caches

    def expected() -> Tensors:
        wide = first[:, :Q_HEADS].clone(), first[:, Q_HEADS : Q_HEADS + KV_HEADS].clone()
        reference.rope_inplace(*wide, cos, sin, HEAD_DIM)
        stored = [wide[1], first[:, Q_HEADS + KV_HEADS :]]
        if scales is not None:
            stored = [to_float8(x, scale) for x, scale in zip(stored, scales)]
        own = [torch.zeros_like(cache) for cache in caches]
        raw = torch.uint8 if float8 else torch.bfloat16
        for cache, x in zip(own, stored):
            at = slots // TOKENS_PER_BLOCK, slots % TOKENS_PER_BLOCK
            cache.view(raw)[at[0], :, at[1]] = x.contiguous().view(raw)
        return wide[0], *own

    kv_bytes = 2 * KV_HEADS * (2 + (1 if float8 else 2))
    num_bytes = rows * HEAD_DIM * (4 * Q_HEADS + kv_bytes) + rows * (HEAD_DIM * 4 + 8)
    return Case(call, expected, num_bytes)


def sample_case(rows: int, greedy: bool, spread: float = 3.0, **filters: float) -> Case:
    logits = normal(rows, VOCAB) * spread
    out = torch.empty(rows, dtype=torch.int32, device=DEVICE)

    def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    how = sampling.SamplingRows(
        temperature=filled(0.0 if greedy else 1.0, torch.float64),
        top_k=filled(filters.get("top_k", 0), torch.int32),
        top_p=filled(filters.get("top_p", 1.0), torch.float64),
        min_p=filled(filters.get("min_p", 0.0), torch.float64),
        seed_low=slots.long(),
        seed_high=slots.long(),
        slots=slots,
        positions=slots,
    )

    def call() -> Tensors:
        sampling.sample(logits, out, vocab_size=VOCAB, rows=how, greedy=greedy)
        return (out,)

    def expected() -> Tensors:
        return (logits.float().argmax(1).int(),)

    return Case(call, expected if greedy else None, rows * VOCAB * 2)


CASES: dict[str, Callable[[int], Case]] = {
    "norm": norm_case,
    "norm_float8": lambda rows: norm_case(rows, True),
    "silu": silu_case,
    "silu_float8": lambda rows: silu_case(rows, True),
    "quantize": quantize_case,
    "quantize_per_token": per_token_case,
    "rope": rope_case,
    "rope_float8": lambda rows: rope_case(rows, True),
    "sample_greedy": lambda rows: sample_case(rows, True),
    "sample_temperature": lambda rows: sample_case(rows, False),
    "sample_top_k": lambda rows: sample_case(rows, False, top_k=50),
    "sample_top_p": lambda rows: sample_case(rows, False, top_p=0.9),
    "sample_top_k_top_p": lambda rows: sample_case(rows, False, top_k=50, top_p=0.9),
    "sample_top_p_flat": lambda rows: sample_case(rows, False, spread=1e-3, top_p=0.9),  # below the histogram's window
}


def differing(ours: Tensors, expected: Tensors) -> float:
    """Returns the largest fraction of differing values among the outputs."""
    pairs = zip(ours, expected, strict=True)
    return max((a.float() != b.float()).float().mean().item() for a, b in pairs)


def microseconds(call: Callable[[], Tensors], repeat: int, trials: int) -> float:
    """Returns the median time of one call among ``repeat`` in a CUDA graph."""
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    graph.replay()
    times = []
    for _ in range(trials):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeat)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 128, 1024, 8192])
    parser.add_argument("--kernels", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--report-json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'kernel':>20} {'rows':>6} {'us':>9} {'GB/s':>8} {'differ':>9}")
    results, wrong = [], []
    for name in arguments.kernels:
        for rows in arguments.rows:
            if name.startswith("sample") and rows > MOST_LOGIT_ROWS:
                continue
            case = CASES[name](rows)
            outputs = case.call()
            share = None if case.expected is None else differing(outputs, case.expected())
            time = microseconds(case.call, arguments.repeat, arguments.trials)
            results.append(Result(name, rows, time, case.num_bytes / time / 1e3, share))
            if share is not None and share > MOST_DIFFERING:
                wrong.append(f"{name} with {rows} rows")
            shown = "-" if share is None else f"{share:.2e}"
            print(f"{name:>20} {rows:>6} {time:>9.2f} {results[-1].gb_per_s:>8.0f} {shown:>9}", flush=True)
    if arguments.report_json:
        arguments.report_json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if wrong:
        raise SystemExit(f"more than {MOST_DIFFERING:.1%} of the values differ from the reference: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
