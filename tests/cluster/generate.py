"""Tokens of the demo model over two ranks, compared with those of one: what the scripts beside this one run.

mpirun -n 2 lamella-launch python tests/cluster/generate.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from lamella import LLM, SamplingParams

MODEL = Path(__file__).parents[2] / "examples" / "demo_model" / "demo-4m"
PROMPTS = ["Once upon a time, a little fox named", "One sunny morning, Ben the bear"]


def generate(num_ranks: int) -> list[list[int]]:
    with LLM(MODEL, dtype="float32", tensor_parallel_size=num_ranks) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0))
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> int:
    alone, shared, again = generate(1), generate(2), generate(2)
    if not alone == shared == again:
        sys.stderr.write(f"one rank gives {alone}, two give {shared}, then {again}\n")
        return 1
    sys.stdout.write(f"{sum(map(len, shared))} tokens over 2 ranks, equal to those of 1\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
