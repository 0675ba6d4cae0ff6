"""The low-level chain for several ranks: one build per rank into one directory, then an executor that runs all of them.

Each rank runs in a process of its own, which the executor starts; on GPUs each has its own. A CPU will do.

Run: python examples/llama_multi_gpu.py --hf_model_dir examples/demo_model/demo-4m --engine_dir /tmp/demo-engine-2 \
         --tp_size 2
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from lamella_builder import BuildConfig, build
from lamella_core import LlamaForCausalLM, Mapping
from lamella_core.engine import EngineWriter
from lamella_executor import GenerationExecutor, SamplingParams

PROMPTS = ["Once upon a time", "One day, a small bear named Tom"]


def build_all(hf_model_dir: Path, engine_dir: Path, tp_size: int) -> None:
    """Reads and builds one rank after another, with the memory of one; see `lamella-build --workers` for several."""
    limits = BuildConfig(max_batch_size=8, max_seq_len=256)
    first = None
    with EngineWriter(engine_dir, tokenizer_dir=hf_model_dir) as writer:
        for rank in range(tp_size):
            mapping = Mapping(world_size=tp_size, tp_size=tp_size, rank=rank)
            model = LlamaForCausalLM.from_hugging_face(hf_model_dir, mapping=mapping, device="auto")
            engine = build(model, limits, like=first)  # all ranks with the kernels of the first
            writer.add_rank(rank, engine.spec, engine.weights(rank))
            first = first or engine.spec
            print(f"rank {rank}: {engine.weight_bytes(rank) / 2**20:.1f} MiB of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf_model_dir", type=Path, required=True)
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--tp_size", type=int, default=2)
    args = parser.parse_args()

    if not (args.engine_dir / "engine.json").is_file():
        build_all(args.hf_model_dir, args.engine_dir, args.tp_size)

    tokenizer = AutoTokenizer.from_pretrained(args.hf_model_dir)
    with GenerationExecutor.create(args.engine_dir) as executor:
        results = executor.generate([tokenizer.encode(p) for p in PROMPTS], SamplingParams(max_tokens=40))
    for prompt, result in zip(PROMPTS, results):
        print(prompt + tokenizer.decode(result.outputs[0].token_ids))


if __name__ == "__main__":
    main()
