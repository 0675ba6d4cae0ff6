"""Requests stream side by side on one event loop; one is cancelled half-way. Run: python examples/async_streaming.py"""

import asyncio
from pathlib import Path

from lamella import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model" / "demo-4m"
PROMPTS = ["Once upon a time", "One day, a small bear named Tom", "The little boat"]


async def stream(llm: LLM, prompt: str, limit: int | None = None) -> str:
    """Returns the text; with ``limit`` the request is aborted after that many pieces."""
    text = ""
    output = llm.generate_async(prompt, SamplingParams(max_tokens=40, temperature=0.8, seed=1), streaming=True)
    pieces = 0
    async for update in output:
        text += update.outputs[0].text_diff
        pieces += 1
        if pieces == limit:
            output.abort()
    return f"{prompt}{text} [{output.status.value}, {pieces} pieces]"


async def main() -> None:
    with LLM(MODEL) as llm:
        tasks = [stream(llm, prompt) for prompt in PROMPTS[:2]]
        for line in await asyncio.gather(*tasks, stream(llm, PROMPTS[2], limit=5)):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
