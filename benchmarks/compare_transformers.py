"""Lamella against `transformers.generate`: same dummy weights, same prompts, one process, alternating, medians.

    python benchmarks/compare_transformers.py [--dtype bfloat16] [--threads 2] [--repeats 3] [--workloads decode]

The model has the shape of TinyLlama-1.1B. Three workloads: decode (batch 1, 128 tokens in, 64 out: the rate of the 63
tokens after the first), prefill (512 tokens in, 1 out) and batch (16 requests of 128 in, 64 out, all at once: output
tokens over wall time). The floor is what this machine's measured read bandwidth and matrix rate allow: weight bytes per
decode step, FLOPs per prompt token.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

from lamella_builder import BuildConfig, build
from lamella_core import AutoConfig, AutoModelForCausalLM
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

WORKLOADS = ["decode", "prefill", "batch"]


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab_size, (count, length), generator=generator).tolist()


class Transformers:
    """The reference implementation, greedy, end of sequence ignored by an exact length."""

    name = "transformers"

    def __init__(self, config_dir: str, dtype: torch.dtype) -> None:
        config = transformers.AutoConfig.from_pretrained(config_dir)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model = model.to_empty(device="cpu").eval()
        generator = torch.Generator().manual_seed(1234)
        pool = torch.empty(2**24, dtype=dtype).uniform_(-1e-3, 1e-3, generator=generator)
        for parameter in self.model.parameters():
            flat = parameter.data.view(-1)
            for start in range(0, flat.numel(), pool.numel()):
                part = flat[start : start + pool.numel()]
                part.copy_(pool[: part.numel()])
        self.model.model.rotary_emb.__init__(config)  # to_empty dropped its buffers

    def generate(self, prompts: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens,
                min_new_tokens=num_tokens, pad_token_id=0,
            )  # fmt: skip
        if out.shape[1] != ids.shape[1] + num_tokens:
            raise RuntimeError(f"transformers generated {out.shape[1] - ids.shape[1]} tokens, not {num_tokens}")


class Lamella:
    """An engine built from the same config.json with dummy weights."""

    name = "lamella"

    def __init__(self, config_dir: str, dtype: str) -> None:
        config = AutoConfig.from_hugging_face(config_dir, dtype=dtype)
        model = AutoModelForCausalLM.get_model_class(config_dir)(config)
        start = time.perf_counter()
        engine = build(model, BuildConfig(max_batch_size=16, max_num_tokens=2048, max_seq_len=1024))
        self.build_s = time.perf_counter() - start
        self.weight_bytes = model.weight_bytes()
        self.num_parameters = model.num_parameters()
        self.executor = GenerationExecutor.create(engine, KvCacheConfig(enable_block_reuse=False))

    def generate(self, prompts: list[list[int]], num_tokens: int) -> None:
        results = self.executor.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
        for result in results:
            if len(result.outputs[0].token_ids) != num_tokens:
                raise RuntimeError(f"lamella generated {len(result.outputs[0].token_ids)} tokens, not {num_tokens}")


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(engine: Transformers | Lamella, workloads: list[str]) -> dict[str, float]:
    """One pass over the workloads; tokens per second."""
    vocab_size = TINYLLAMA["vocab_size"]
    one, long, many = (random_prompts(n, length, vocab_size) for n, length in ((1, 128), (1, 512), (16, 128)))
    result: dict[str, float] = {}
    if "decode" in workloads:
        first = seconds(lambda: engine.generate(one, 1))
        result["decode"] = 63 / (seconds(lambda: engine.generate(one, 64)) - first)
    if "prefill" in workloads:
        result["prefill"] = 512 / seconds(lambda: engine.generate(long, 1))
    if "batch" in workloads:
        result["batch"] = 16 * 64 / seconds(lambda: engine.generate(many, 64))
    return result


def floors(lamella: Lamella, dtype: torch.dtype, bandwidth: float, rate: float) -> dict[str, float]:
    """Tokens per second at the machine's ceilings: one kernel after another, everything else free."""
    embedding = TINYLLAMA["vocab_size"] * TINYLLAMA["hidden_size"]  # gathered, not read or multiplied
    weights = lamella.weight_bytes - embedding * dtype.itemsize
    flops = 2 * (lamella.num_parameters - 2 * embedding)  # per prompt token; logits of the last one only
    step = max(weights / bandwidth, 16 * (flops + 2 * embedding) / rate)
    batch = 16 * 64 / (16 * 128 * flops / rate + 63 * step)
    return {"decode": bandwidth / weights, "prefill": rate / flops, "batch": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--report-json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**TINYLLAMA, "torch_dtype": args.dtype}))
        lamella = Lamella(folder, args.dtype)
        peer = Transformers(folder, dtype)
    gc.collect()
    print(machine.describe() + f", transformers {transformers.__version__}")
    print(f"Lamella build with kernel selection: {lamella.build_s:.1f} s")
    ceilings: list[tuple[float, float]] = []
    samples: dict[str, list[dict[str, float]]] = {"transformers": [], "lamella": []}
    for _ in range(args.repeats):
        ceilings.append((machine.read_bandwidth(), machine.matmul_rate(dtype)))
        for engine in (peer, lamella):
            samples[engine.name].append(measure(engine, args.workloads))
    lamella.executor.shutdown()
    bandwidth, rate = (max(values) for values in zip(*ceilings))
    floor = floors(lamella, dtype, bandwidth, rate)
    print(f"read {bandwidth / 1e9:.1f} GB/s, matrix product {rate / 1e9:.0f} GFLOP/s (best of {len(ceilings)})")
    report = {}
    print(f"{'tokens/s':10s} {'transformers':>13s} {'lamella':>9s} {'ratio':>7s} {'floor':>8s} {'of floor':>9s}")
    for name in args.workloads:
        a, b = (statistics.median(s[name] for s in samples[who]) for who in ("transformers", "lamella"))
        report[name] = {"transformers": a, "lamella": b, "ratio": b / a, "floor": floor[name]}
        print(f"{name:10s} {a:13.1f} {b:9.1f} {b / a:6.1f}x {floor[name]:8.1f} {b / floor[name]:8.0%}")
    if args.report_json:
        args.report_json.write_text(
            json.dumps({"machine": machine.describe(), "dtype": args.dtype, **report}, indent=2)
        )


if __name__ == "__main__":
    main()
