"""``lamella generate``: text on stdout as it comes, a line of numbers on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from lamella.llm import LLM
from lamella.outputs import RequestOutput
from lamella_core.errors import ConfigError
from lamella_executor import SamplingParams


def run_generate(
    model: str, prompts: list[str], params: SamplingParams, *, chat: bool, tokenizer: str | None, **arguments: Any
) -> None:
    """Generates for all prompts at once and prints the texts in order, the first one while it is being made.

    ``arguments`` are further ones of `LLM`.
    """
    err = Console(stderr=True, highlight=False)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    start = time.perf_counter()
    with err.status(f"loading {escape(model)}"):
        llm = LLM(model, tokenizer, **arguments)
    with llm:
        load_s = time.perf_counter() - start
        if chat:
            texts = [_as_chat(llm, text) for text in texts]
            params = replace(params, stop_token_ids=(llm.tokenizer and llm.tokenizer.turn_end_token_ids) or None)
        start = time.perf_counter()
        outputs = [llm.generate_async(text, params, streaming=True) for text in texts]
        for prompt, output in zip(prompts, outputs):
            if len(outputs) > 1:
                err.print(f"[dim]> {escape(prompt[:200])}[/dim]")
            _print_stream(output)
        seconds = time.perf_counter() - start
    _print_numbers(err, outputs, load_s, seconds)


def _as_chat(llm: LLM, text: str) -> str:
    if llm.tokenizer is None:
        raise ConfigError("--chat needs a tokenizer")
    return llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])


def _print_stream(output: RequestOutput) -> None:
    for update in output:
        typer.echo(update.outputs[0].text_diff if update.outputs else "", nl=False)
    typer.echo()


def _print_numbers(err: Console, outputs: list[RequestOutput], load_s: float, seconds: float) -> None:
    tokens = sum(len(output.token_ids) for output in outputs)
    ttfts = [o.metrics.ttft_s for o in outputs if o.metrics is not None and o.metrics.ttft_s is not None]
    ttft = f", first token after {1000 * min(ttfts):.0f} ms" if ttfts else ""
    err.print(f"[dim]loaded in {load_s:.2f} s{ttft}, {tokens} tokens, {tokens / seconds:.1f} tokens/s[/dim]")
