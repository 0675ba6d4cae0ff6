"""Attention backends on a GPU: FlashInfer and Triton checked against each other, then timed side by side.

    python benchmarks/gpu_attention_backends.py [--dtype bf16 fp8] [--page-size 64] [--seconds 170] [--xqa-gmma]

The heads are Llama-3.1-8B's: 32 query heads over 8 KV heads of 128. Queries are a strided part of a fused projection,
as in a model, so a copy that a backend makes of them counts; block tables are gathered once per step and do not. A
decoding time is that of one call in a CUDA graph which goes round over block tables that exceed the L2 cache together;
GB/s counts the keys and values. A prompt time is that of one call outside a graph, planning excluded; TFLOP/s count the
causal half. --xqa-gmma adds XQA's Hopper kernel over a bf16 cache, which FlashInfer itself uses for float8 only: should
it fault, it ends the run. Tables come last. A backend that cannot run is named with the reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella_core.context import AttentionSpec
from lamella_executor.attention.backend import AttentionBackend, AttentionStep, HostLengths, LayerCall, StepAttention
from lamella_executor.attention.flashinfer_backend import FlashInferAttention, why_no_flashinfer
from lamella_executor.attention.paged_cpu import LayerWindow

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SEQUENCES = (1, 8, 64, 256, 1024, 2048)
CONTEXTS = (128, 1024, 4096)
PROMPTS = ((64, 128, 128), (8, 1000, 1000), (4, 2048, 2048), (1, 8192, 8192), (8, 512, 4096))  # count, query, context
MOST_TOKENS = 4 << 20  # in the cache: 17 GB of bf16 in the one layer that is timed
COLD_BYTES = 192 << 20  # of keys that one round reads; four times an H100's L2 cache
CALL_S, MOST_CALLS = 4e-3, 200  # per measurement
# largest relative RMS difference: bf16 rounds the results; XQA also rounds queries and weights to 3 mantissa bits
BOUNDS = {"bf16": 0.01, "fp8": 0.08}


class _Refusal:
    """The fallback here: what it is asked for cannot be timed."""

    name = "nothing"
    is_capturable = True

    def begin(self, step: AttentionStep) -> StepAttention:
        raise RuntimeError("FlashInfer does not serve this call; the log above says why")


@dataclass
class Case:
    """A layer over a cache that stays, and where the sequences of steps lie in it."""

    layer: LayerCall
    page_size: int
    num_blocks: int

    def step(self, contexts: list[int], queries: list[int], seed: int) -> AttentionStep:
        """A step of sequences in random places; those with one query come first."""
        context, query = np.array(contexts, np.int32), np.array(queries, np.int32)
        width = -(-max(contexts) // self.page_size)
        generator = torch.Generator("cuda").manual_seed(seed)
        blocks = torch.randperm(self.num_blocks, generator=generator, device="cuda", dtype=torch.int32)
        tables = blocks[: len(contexts) * width].view(len(contexts), width)
        num_decode = int((query == 1).sum())
        starts = np.concatenate([[0], np.cumsum(query[num_decode:])]).astype(np.int32)
        rows = torch.arange(len(contexts), device="cuda", dtype=torch.int32)
        lengths, begins = (torch.from_numpy(array).cuda() for array in (context, starts))
        return AttentionStep(
            tables, rows, lengths, begins,
            num_decode=num_decode, num_tokens=int(query.sum()), max_query_len=int(query.max()),
            max_context_len=int(context.max()), host=HostLengths(context, query),
        )  # fmt: skip


def make_case(dtype: str, page_size: int) -> Case:
    num_blocks = MOST_TOKENS // page_size
    caches = []
    for _ in range(2):
        cache = torch.empty((num_blocks + 1, KV_HEADS, page_size, HEAD_DIM), dtype=DTYPES[dtype], device="cuda")
        for part in cache.split(max(1, num_blocks // 64)):
            part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device="cuda"))
        caches.append(cache)
    spec = AttentionSpec(0, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
    scales = torch.tensor([0.9, 1.1], device="cuda") if dtype == "fp8" else None
    return Case(LayerCall(spec, LayerWindow(), *caches, None, None, scales, None), page_size, num_blocks)


def make_queries(tokens: int) -> Tensor:
    """[tokens, Hq, D], part of a fused projection."""
    return torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")[:, :HEADS]


@contextlib.contextmanager
def hopper_kernel_for_halves() -> Iterator[None]:
    """Lets XQA run its Hopper kernel over whatever cache."""
    library: Any = importlib.import_module("flashinfer.xqa")
    load = library.get_xqa_module

    def patched(*args: Any, **options: Any) -> SimpleNamespace:
        run = load(*args, **options).xqa
        return SimpleNamespace(xqa=lambda _, *rest: run(True, *rest))

    library.get_xqa_module = patched
    try:
        yield
    finally:
        library.get_xqa_module = load


@dataclass(frozen=True)
class Contender:
    """A backend under the name that the tables give it, and what it needs around its calls."""

    name: str
    backend: AttentionBackend
    phases: tuple[str, ...]
    dtypes: tuple[str, ...] = ("bf16", "fp8")
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def make_contenders(with_gmma: bool) -> list[Contender]:
    from lamella_executor.attention.triton_backend import TritonAttention

    found = [Contender("triton", TritonAttention(), ("decode", "prefill"))]
    reason = why_no_flashinfer()
    if reason is not None:
        print(f"without FlashInfer: {reason}")
        return found
    for name, phases, dtypes, around in (
        ("xqa", ("decode",), ("bf16", "fp8"), contextlib.nullcontext),
        ("xqa-gmma", ("decode",), ("bf16",), hopper_kernel_for_halves),
        ("fa2", ("prefill",), ("bf16", "fp8"), contextlib.nullcontext),
        ("fa3", ("prefill",), ("bf16",), contextlib.nullcontext),
    ):
        if name == "xqa-gmma" and not with_gmma:
            continue
        decodes = "decode" in phases
        kernel = "auto" if decodes else name
        backend = FlashInferAttention(_Refusal(), decode=decodes, prefill=not decodes, prefill_kernel=kernel)
        found.append(Contender(name, backend, phases, dtypes, around))
    return found


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:200]}"


def check(contenders: list[Contender], case: Case, dtype: str, failures: list[str]) -> list[Contender]:
    """Compares each contender with plain attention on a small mixed step; returns those that agree."""
    from lamella_executor.attention.torch_backend import TorchAttention

    step = case.step([1, 64, 65, 700, 2049, 130, 300, 900], [1, 1, 1, 1, 1, 130, 77, 5], seed=1)
    q = make_queries(step.num_tokens)
    oracle = TorchAttention().begin(step)
    expected = {"decode": oracle.decode(q[:5], case.layer), "prefill": oracle.prefill(q[5:], case.layer)}
    good = []
    for contender in (c for c in contenders if dtype in c.dtypes):
        try:
            for phase in contender.phases:
                begin = time.perf_counter()
                with contender.around():
                    part = contender.backend.begin(step)
                    out = getattr(part, phase)(q[:5] if phase == "decode" else q[5:], case.layer)
                torch.cuda.synchronize()
                difference = float((out.float() - expected[phase].float()).norm() / expected[phase].float().norm())
                seconds = time.perf_counter() - begin
                print(
                    f"{dtype} {contender.name} {phase}: off by {difference:.4f}, first call {seconds:.1f} s", flush=True
                )
                if not difference <= BOUNDS[dtype]:
                    raise RuntimeError(f"{phase} is off by {difference:.4f}, more than {BOUNDS[dtype]}")
            good.append(contender)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one backend, the others are timed
            failures.append(f"{dtype} {contender.name}: {reason_of(error)}")
            print(failures[-1], flush=True)
    return good


def time_calls(calls: list[Callable[[], Tensor]], in_graph: bool) -> float:
    """Seconds per call of a round of calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()

    def replay() -> None:
        for call in calls:
            call()

    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replay()
        replay = graph.replay
    replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rounds, seconds = 1, 0.0
    while True:
        start.record()
        for _ in range(rounds):
            replay()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        if seconds >= CALL_S or rounds * len(calls) >= MOST_CALLS:
            return seconds / (rounds * len(calls))
        rounds *= 4


def decode_row(contenders: list[Contender], case: Case, count: int, context: int) -> dict[str, float]:
    """Seconds per decoding call by contender."""
    size = count * context * 2 * KV_HEADS * HEAD_DIM * case.layer.k_cache.itemsize
    steps = [case.step([context] * count, [1] * count, seed) for seed in range(min(32, 1 + COLD_BYTES // size))]
    q = make_queries(count)
    row = {}
    for contender in contenders:
        with contender.around():
            begun = [contender.backend.begin(step) for step in steps]
            row[contender.name] = time_calls([lambda b=b: b.decode(q, case.layer) for b in begun], in_graph=True)
    return row


def prompt_row(contenders: list[Contender], case: Case, count: int, query: int, context: int) -> dict[str, float]:
    """Seconds per prompt call by contender."""
    step = case.step([context] * count, [query] * count, seed=3)
    q = make_queries(step.num_tokens)
    row = {}
    for contender in contenders:
        begun = contender.backend.begin(step)
        row[contender.name] = time_calls([lambda b=begun: b.prefill(q, case.layer)] * 4, in_graph=False)
    return row


def table(title: str, rows: list[tuple[str, float, dict[str, float]]], unit: str) -> str:
    """Rows of (label, work, seconds by contender) as microseconds and the rate of the work."""
    names = list(dict.fromkeys(name for *_, row in rows for name in row))
    lines = [f"{title}: us ({unit})", f"{'':24}" + "".join(f"{name:>18}" for name in names)]
    for label, work, row in rows:
        cells = (f"{row[n] * 1e6:.1f} ({work / row[n]:.0f})" if n in row else "-" for n in names)
        lines.append(f"{label:24}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def measure(dtype: str, contenders: list[Contender], case: Case, deadline: float) -> Iterator[str]:
    """Times what agrees; yields tables."""
    rows: list[tuple[str, float, dict[str, float]]] = []
    decoding = [c for c in contenders if "decode" in c.phases]
    for context in CONTEXTS:
        for count in SEQUENCES:
            if count * context <= MOST_TOKENS and time.monotonic() < deadline:
                work = count * context * 2 * KV_HEADS * HEAD_DIM * case.layer.k_cache.itemsize / 1e9
                rows.append((f"{dtype} {count} x {context}", work, decode_row(decoding, case, count, context)))
                print(".", end="", flush=True)
    yield table("decode, sequences x context", rows, "GB/s")
    rows = []
    for count, query, context in PROMPTS:
        if time.monotonic() < deadline:
            work = 4 * HEADS * HEAD_DIM * count * query * (context - query / 2) / 1e12
            seconds = prompt_row([c for c in contenders if "prefill" in c.phases], case, count, query, context)
            rows.append((f"{dtype} {count} x {query} of {context}", work, seconds))
            print(".", end="", flush=True)
    yield table("prompts, count x tokens of context", rows, "TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--page-size", type=int, default=64, choices=(16, 32, 64, 128), help="tokens per KV block")
    parser.add_argument("--xqa-gmma", action="store_true", help="also time XQA's Hopper kernel over a bf16 cache")
    parser.add_argument("--seconds", type=float, default=170, help="no measurement starts later than this")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, blocks of {options.page_size} tokens")
    contenders, tables, failures = make_contenders(options.xqa_gmma), [], []
    for dtype in options.dtype:
        case = make_case(dtype, options.page_size)
        try:
            tables += measure(dtype, check(contenders, case, dtype, failures), case, deadline)
        except Exception as error:  # noqa: BLE001 - the other dtype's table is still worth printing
            failures.append(f"{dtype}: {reason_of(error)}")
        del case
        torch.cuda.empty_cache()
    print("\n" + "\n\n".join(tables))
    for failure in failures:
        print("failed:", failure)


if __name__ == "__main__":
    main()
