"""Prints the roofline of a model on one GPU: output tokens/s by workload, batch-1 floors, floors of a decode step.

    python benchmarks/roofline.py [--hf-config benchmarks/configs/llama-3.1-8b] [--gpu "NVIDIA H100 80GB HBM3"]
    python benchmarks/roofline.py --measure      # rates of the GPU at hand instead of recorded ones

The formulae are in `lamella.roofline`, which `lamella bench` uses too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lamella.roofline import KNOWN_HARDWARE, Hardware, ModelShape, Roofline, find_hardware
from lamella_core import AutoConfig
from lamella_core.config import ModelConfig
from lamella_core.errors import LamellaError
from lamella_core.quantization.config import QuantConfig

WORKLOADS = ((128, 128), (128, 2048), (128, 4096), (500, 2000), (1000, 1000), (1000, 2000), (2048, 128), (2048, 2048),
             (5000, 500))  # fmt: skip
SCHEMES = {
    "16-bit weights and KV": QuantConfig(),
    "fp8 weights": QuantConfig(quant_algo="FP8"),  # type: ignore[arg-type]
    "fp8 weights and KV": QuantConfig(quant_algo="FP8", kv_cache_quant_algo="FP8"),  # type: ignore[arg-type]
}
STEP_BATCHES = (1, 8, 32, 64, 128, 256, 512)
STEP_CONTEXT = 1024
FLOOR_CONTEXT = 128


def shapes(config: ModelConfig) -> dict[str, ModelShape]:
    """One for each of `SCHEMES`."""
    return {name: ModelShape.of(replace(config, quantization=scheme)) for name, scheme in SCHEMES.items()}


def print_tables(models: dict[str, ModelShape], hardware: Hardware) -> None:
    found = {name: Roofline(model, hardware) for name, model in models.items()}
    gib, source = 1 << 30, "measured" if hardware.is_measured else "data sheet"
    fp8_flops = hardware.fp8_flops or hardware.bf16_flops
    print(
        f"{hardware.name} ({source}): {hardware.bandwidth / 1e12:.2f} TB/s, {hardware.bf16_flops / 1e12:.0f} TFLOP/s "
        f"bf16, {fp8_flops / 1e12:.0f} fp8"
    )
    for name, roofline in found.items():
        model = roofline.model
        print(
            f"{name}: {model.weight_bytes / gib:.2f} GiB of weights, {model.kv_bytes} bytes of KV per token, room for "
            f"{roofline.kv_tokens / 1e3:,.0f}k tokens"
        )
    print("\nOutput tokens/s: serial (overlapped) bound, requests that run at once\n")
    print("| ISL/OSL | " + " | ".join(f"{name} | B" for name in found) + " |")
    print("|---" * (1 + 2 * len(found)) + "|")
    for isl, osl in WORKLOADS:
        cells = [_throughput_cells(roofline, isl, osl) for roofline in found.values()]
        print(f"| {isl}/{osl} | " + " | ".join(cells) + " |")
    print(f"\nLeast ms of a decode step by requests, {STEP_CONTEXT} tokens of context (short: {FLOOR_CONTEXT})\n")
    print("| | 1, short | " + " | ".join(map(str, STEP_BATCHES)) + " |")
    print("|---" * (2 + len(STEP_BATCHES)) + "|")
    for name, roofline in found.items():
        steps = [roofline.step(1, FLOOR_CONTEXT), *(roofline.step(batch, STEP_CONTEXT) for batch in STEP_BATCHES)]
        print(f"| {name} | " + " | ".join(f"{1e3 * step:.2f}" for step in steps) + " |")


def _throughput_cells(roofline: Roofline, isl: int, osl: int) -> str:
    if roofline.kv_tokens < isl + osl:
        return "- | -"
    serial, overlap = roofline.serial(isl, osl), roofline.overlap(isl, osl)
    return f"{serial:,.0f} ({overlap:,.0f}) | {roofline.concurrency(isl, osl):.0f}"


def measure_hardware() -> Hardware:
    """Measures the GPU at hand: a copy within its memory, a read of it, and square products of 8192."""
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()
    copied = 2 * num_bytes / _seconds(lambda: target.copy_(source))
    read = num_bytes / _seconds(lambda: torch.max(source))
    print(f"copy {copied / 1e12:.2f} TB/s (read and written), read only {read / 1e12:.2f} TB/s")
    x, w = (torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16).uniform_(-1e-3, 1e-3) for _ in range(2))
    flop = 2 * 8192**3
    bf16 = flop / _seconds(lambda: x @ w.t())
    fp8 = None
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        a, b = (x * 1e5).to(torch.float8_e4m3fn), (w * 1e5).to(torch.float8_e4m3fn)
        product = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        fp8 = flop / _seconds(product)
    return Hardware(name, 0.95 * total, copied, bf16, fp8, is_measured=True)


def _seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of ``run`` on the GPU, after a warm-up."""
    times = []
    for index in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-config", type=Path, default=here / "configs" / "llama-3.1-8b")
    parser.add_argument("--gpu", default=KNOWN_HARDWARE[0].name, help="; ".join(h.name for h in KNOWN_HARDWARE))
    parser.add_argument("--measure", action="store_true", help="measure this machine's GPU")
    parser.add_argument("--bandwidth", type=float, help="bytes per second instead of the recorded ones")
    parser.add_argument("--bf16-flops", type=float, help="FLOP per second instead of the recorded ones")
    args = parser.parse_args()
    if args.measure and not torch.cuda.is_available():
        parser.error("--measure needs a GPU")
    try:
        models = shapes(AutoConfig.from_hugging_face(args.hf_config))
    except LamellaError as error:
        parser.exit(2, f"{parser.prog}: error: --hf-config: {' '.join(str(error).split())}\n")
    hardware = measure_hardware() if args.measure else find_hardware(args.gpu)
    if hardware is None:
        parser.error(f"--gpu {args.gpu!r} is not known; known: {', '.join(h.name for h in KNOWN_HARDWARE)}")
    if args.bandwidth:
        hardware = replace(hardware, bandwidth=args.bandwidth)
    if args.bf16_flops:
        hardware = replace(hardware, bf16_flops=args.bf16_flops)
    print_tables(models, hardware)


if __name__ == "__main__":
    main()
