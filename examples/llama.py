"""The low-level chain, one step at a time: Hugging Face model -> build -> engine on disk -> executor -> token ids.

Run: python examples/llama.py --hf_model_dir examples/demo_model/demo-4m --engine_dir /tmp/demo-engine
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from lamella_builder import BuildConfig, build
from lamella_core import LlamaForCausalLM
from lamella_executor import GenerationExecutor, SamplingParams

PROMPTS = ["Once upon a time", "One day, a small bear named Tom"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf_model_dir", type=Path, required=True)
    parser.add_argument("--engine_dir", type=Path, required=True)
    args = parser.parse_args()

    if not (args.engine_dir / "engine.json").is_file():
        model = LlamaForCausalLM.from_hugging_face(args.hf_model_dir)
        engine = build(model, BuildConfig(max_batch_size=8, max_seq_len=256), tokenizer_dir=args.hf_model_dir)
        engine.save(args.engine_dir)
        print("built:", ", ".join(f"{step} {s:.2f} s" for step, s in engine.spec.step_seconds.items()))

    tokenizer = AutoTokenizer.from_pretrained(args.hf_model_dir)
    with GenerationExecutor.create(args.engine_dir) as executor:
        results = executor.generate([tokenizer.encode(p) for p in PROMPTS], SamplingParams(max_tokens=40))
    for prompt, result in zip(PROMPTS, results):
        print(prompt + tokenizer.decode(result.outputs[0].token_ids))


if __name__ == "__main__":
    main()
