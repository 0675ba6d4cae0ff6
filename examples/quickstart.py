"""Four prompts to the bundled demo model, which writes children's stories. Run: python examples/quickstart.py"""

import logging
import time
from pathlib import Path

from lamella import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model" / "demo-4m"
PROMPTS = [
    "Once upon a time, a little fox named",
    "One sunny morning, Ben the bear",
    "On her birthday, Anna the goat got a blue kite",
    "Question: What is 7 + 5?\nAnswer:",
]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the first run says that it compiles the CPU kernels
    start = time.perf_counter()
    with LLM(MODEL) as llm:
        load_s = time.perf_counter() - start

        start = time.perf_counter()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=60))
        seconds = time.perf_counter() - start

    for output in outputs:
        print(f"{output.prompt}{output.outputs[0].text.rstrip()}\n")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    ttft_ms = 1000 * sum(output.metrics.ttft_s for output in outputs) / len(outputs)
    print(f"load {load_s:.2f} s, time to first token {ttft_ms:.0f} ms, {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
