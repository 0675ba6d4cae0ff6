"""Entry point of ``lamella``. Imports no torch before a command runs, so that ``--help`` answers at once.

Exit codes: 0 done, 1 failed (or a check that did not pass), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lamella.cli.bench.commands import bench_app
from lamella.cli.sizes import (
    AutoParallelOption,
    EpOption,
    GpusPerNodeOption,
    PpOption,
    TpOption,
    WorldSizeOption,
    sizes,
)
from lamella_core.errors import ConfigError, LamellaError

app = typer.Typer(
    name="lamella",
    help="Compile and serve large language models on any machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")

ModelArgument = Annotated[
    str, typer.Argument(help="Hub id, Hugging Face directory, Lamella checkpoint or engine directory.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
QuantOption = Annotated[str | None, typer.Option(help="fp8 or fp8_per_channel_per_token; default: as the weights are.")]
KvCacheDtypeOption = Annotated[str, typer.Option(help="auto (as the weights say) or fp8.")]


def main() -> None:
    """Runs the command line and exits; every expected error is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text that the terminal's encoding lacks is shown as '?'
    try:
        app()
    except (LamellaError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {_escaped(message)}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lamella {installed_version('lamella')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(  # noqa: PLR0913 - one parameter per option
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts; '-' reads one from stdin.")],
    max_tokens: Annotated[int, typer.Option(help="Generated tokens at most, per prompt.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="0 or unset: greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the tokens that make up this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this string; may be given several times.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Directory or hub id; default: the model's own.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quant: QuantOption = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    tp_size: TpOption = None,
    pp_size: PpOption = None,
    ep_size: EpOption = None,
    auto_parallel: AutoParallelOption = False,
    world_size: WorldSizeOption = None,
    gpus_per_node: GpusPerNodeOption = None,
) -> None:
    """Generate text for each prompt, printed as it comes."""
    from lamella.cli.generate import run_generate
    from lamella_core.quantization.config import parse_options
    from lamella_executor import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
        add_special_tokens=not chat,
    )  # fmt: skip
    run_generate(
        model, prompts, params, chat=chat, tokenizer=tokenizer, dtype=dtype, device=device,
        quant_config=parse_options(quant, kv_cache_dtype),
        **sizes(tp_size, pp_size, ep_size, auto_parallel, world_size, gpus_per_node),
    )  # fmt: skip


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this machine can run, what is missing, and the command that adds it."""
    from lamella.cli.doctor import run_doctor

    run_doctor(as_json=as_json)


@app.command()
def check(  # noqa: PLR0913 - one parameter per option
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    text_file: Annotated[Path | None, typer.Option(help="Text for the perplexity; default: a built-in one.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Greedy tokens to compare per prompt.", min=1)] = 32,
    dtype: DtypeOption = "float32",
    tolerance: Annotated[
        float, typer.Option(help="Largest error of a logit, relative to the largest logit.", min=0)
    ] = 1e-3,
    device: DeviceOption = "auto",
    quant: QuantOption = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    tp_size: TpOption = None,
    pp_size: PpOption = None,
    ep_size: EpOption = None,
    auto_parallel: AutoParallelOption = False,
    world_size: WorldSizeOption = None,
    gpus_per_node: GpusPerNodeOption = None,
) -> None:
    """Compare logits, greedy tokens and perplexity with transformers; exit code 1 if they differ.

    Where transformers has no class, the comparison is with a plain float32 computation, and the output says so.

    Of quantized models only the perplexity decides, compared with that of the weights in their own precision.
    """
    from lamella.cli.check import run_check
    from lamella_core.quantization.config import parse_options

    try:
        text = text_file.read_text(encoding="utf-8") if text_file is not None else None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text-file: {text_file} is not UTF-8 text ({error})") from error
    quantization = parse_options(quant, kv_cache_dtype)
    if not run_check(
        hf_dir, text=text, max_tokens=max_tokens, dtype=dtype, tolerance=tolerance, device=device,
        quant_config=quantization, **sizes(tp_size, pp_size, ep_size, auto_parallel, world_size, gpus_per_node),
    ):  # fmt: skip
        raise typer.Exit(1)
