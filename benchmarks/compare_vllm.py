"""Lamella and vLLM on one workload: same config.json, dummy weights, random prompts of the same ids, greedy.

    python benchmarks/compare_vllm.py --hf-config benchmarks/configs/llama-3.1-8b --isl 128 --osl 128 \
        --num-requests 6000 [--quant fp8 --kv-cache-dtype fp8] [--mode latency] [--vllm '{"max_num_seqs": 1024}']

Each engine has a process of its own and the GPU to itself, Lamella first. vLLM runs with its defaults, prefix caching
off, as far as --vllm (JSON, keywords of its `LLM`) does not say otherwise. Without vLLM only Lamella is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SAME_AS_LAMELLA = ("hf_config", "dtype", "isl", "osl", "quant", "kv_cache_dtype", "seed")


def measure_vllm(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the workload in vLLM, in this process."""
    started = time.perf_counter()
    import vllm

    options: dict[str, Any] = {
        "model": str(args.hf_config), "load_format": "dummy", "skip_tokenizer_init": True, "dtype": args.dtype,
        "max_model_len": args.isl + args.osl, "enable_prefix_caching": False, "kv_cache_dtype": args.kv_cache_dtype,
        "seed": args.seed,
    }  # fmt: skip
    if args.quant:
        options["quantization"] = args.quant
    llm = vllm.LLM(**{**options, **args.vllm})
    start_s = time.perf_counter() - started
    from lamella.cli.bench.workload import stream_prompts  # no part of vLLM's start, which imports much of the same
    from lamella_core import AutoConfig

    vocab_size = AutoConfig.from_hugging_face(args.hf_config).vocab_size

    def run(count: int, num_tokens: int, stream: int) -> float:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        ids = stream_prompts(vocab_size, args.seed, args.isl, count, stream)
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != num_tokens for output in outputs):
            raise RuntimeError("vLLM ended a request early")
        return seconds

    found: dict[str, Any] = {"version": vllm.__version__, "start_s": start_s}
    if args.mode == "latency":
        run(args.batch_size, args.osl, -2)
        times = [(run(args.batch_size, 1, i), run(args.batch_size, args.osl, i)) for i in range(args.num_runs)]
        per_token = [(whole - one) / (args.osl - 1) for one, whole in times]
        return {**found, "time_per_output_token_s": statistics.median(per_token)}
    run(min(args.num_requests, 256), min(args.osl, 32), -2)
    seconds = run(args.num_requests, args.osl, 0)
    return {**found, "output_throughput": args.num_requests * args.osl / seconds, "wall_s": seconds}


def measure_lamella(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Runs the workload by ``lamella bench``, in a process of its own; exits with its code if it fails."""
    command = [sys.executable, "-c", "from lamella.cli.main import main; main()", "bench", args.mode]
    command += ["--load-format", "dummy", "--no-breakdown", "--report-json", str(path)]
    names = {"throughput": ("num_requests",), "latency": ("batch_size", "num_runs")}[args.mode]
    for name in (*SAME_AS_LAMELLA, *names):
        value = getattr(args, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    code = subprocess.run(command).returncode
    if code:
        print(f"Lamella failed with exit code {code}; its messages are above", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # negative: ended by that signal
    report = json.loads(path.read_text())
    return {**report["results"], "version": report["versions"]["lamella"], "start_s": report["start_s"]}


def run_vllm(args: argparse.Namespace, path: Path) -> dict[str, Any] | None:
    """Starts this script once more for vLLM; None if it is not installed or failed."""
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed in this environment (pip install vllm): only Lamella was measured")
        return None
    code = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--vllm-result", str(path)]).returncode
    if code or not path.exists():
        print(f"vLLM failed with exit code {code}; its messages are above")
        return None
    return json.loads(path.read_text())


def print_results(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    key, unit, factor = ("output_throughput", "output tokens/s", 1.0)
    if args.mode == "latency":
        key, unit, factor = ("time_per_output_token_s", "ms per output token", 1e3)
    if torch.cuda.is_available():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"\n| {args.isl}/{args.osl}, {args.dtype}, {args.quant or 'unquantized'} | {unit} | start, s |")
    print("|---|---|---|")
    for name, result in results.items():
        print(f"| {name} {result['version']} | {factor * result[key]:,.2f} | {result['start_s']:.1f} |")
    if len(results) == 2:
        ours, theirs = (result[key] for result in results.values())
        print(f"\nLamella is {ours / theirs if args.mode == 'throughput' else theirs / ours:.2f} times as fast")


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as '{{\"max_num_seqs\": 1024}}'")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("throughput", "latency"), default="throughput")
    parser.add_argument("--hf-config", type=Path, required=True, help="directory with a config.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quant", help="fp8: static scales in Lamella, dynamic activation scales in vLLM")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=128)
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1, help="latency mode")
    parser.add_argument("--num-runs", type=int, default=5, help="latency mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm", type=json_object, default="{}", help="JSON object of further keywords of vllm.LLM")
    parser.add_argument("--vllm-result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode == "latency" and args.osl < 2:
        parser.error("latency mode needs --osl of at least 2")
    return args


def main() -> None:
    args = parse()
    if args.vllm_result is not None:
        args.vllm_result.write_text(json.dumps(measure_vllm(args)))
        sys.stdout.flush()
        os._exit(0)  # vLLM's engine process would otherwise outlive the interpreter's exit and hold the GPU
    with tempfile.TemporaryDirectory() as folder:
        results = {"Lamella": measure_lamella(args, Path(folder) / "lamella.json")}
        theirs = run_vllm(args, Path(folder) / "vllm.json")
        if theirs is not None:
            results["vLLM"] = theirs
        print_results(args, results)


if __name__ == "__main__":
    main()
