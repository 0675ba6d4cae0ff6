"""Tokens per second of a model of which only config.json is at hand: AutoConfig -> dummy weights -> build -> executor.

Run: python examples/dummy_benchmark.py --hf_config_dir examples/demo_model/demo-4m
"""

import argparse
import random
import time
from pathlib import Path

from lamella_builder import BuildConfig, build
from lamella_core import AutoConfig, AutoModelForCausalLM
from lamella_executor import GenerationExecutor, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf_config_dir", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num_requests", type=int, default=8)
    parser.add_argument("--input_len", type=int, default=64)
    parser.add_argument("--output_len", type=int, default=32)
    args = parser.parse_args()

    config = AutoConfig.from_hugging_face(args.hf_config_dir, dtype=args.dtype)
    model = AutoModelForCausalLM.get_model_class(args.hf_config_dir)(config)
    print(f"{config.architecture}: {model.num_parameters():,} random parameters, {config.dtype}")
    engine = build(model, BuildConfig(max_batch_size=args.num_requests, max_seq_len=args.input_len + args.output_len))

    rng = random.Random(0)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(args.input_len)] for _ in range(args.num_requests)]
    with GenerationExecutor.create(engine) as executor:
        start = time.perf_counter()
        results = executor.generate(prompts, SamplingParams(max_tokens=args.output_len, ignore_eos=True))
        seconds = time.perf_counter() - start
    tokens = sum(len(result.outputs[0].token_ids) for result in results)
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
