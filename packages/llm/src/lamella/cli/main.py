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

from lamella_core.errors import ConfigError, LamellaError

app = typer.Typer(
    name="lamella",
    help="Compile and serve large language models on any machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure throughput or latency.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

ModelArgument = Annotated[
    str, typer.Argument(help="Hub id, Hugging Face directory, Lamella checkpoint or engine directory.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


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
) -> None:
    """Generate text for each prompt, printed as it comes."""
    from lamella.cli.generate import run_generate
    from lamella_executor import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
        add_special_tokens=not chat,
    )  # fmt: skip
    run_generate(model, prompts, params, chat=chat, tokenizer=tokenizer, dtype=dtype)


_HfConfig = Annotated[
    Path | None, typer.Option(help="Directory with a config.json; with --load-format dummy no weights are needed.")
]
_Model = Annotated[str | None, typer.Option(help="Model to measure: hub id, directory, checkpoint or engine.")]
_LoadFormat = Annotated[str, typer.Option(help="auto, or dummy: random weights from config.json alone.")]
_Isl = Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)]
_Osl = Annotated[int, typer.Option(help="Tokens generated per prompt.", min=1)]
_Warmup = Annotated[int, typer.Option(help="Requests run before the clock starts.", min=0)]
_Report = Annotated[Path | None, typer.Option(help="Write everything that was measured to this JSON file.")]
_BatchSize = Annotated[int | None, typer.Option(help="Requests per step at most.", min=1)]
_Kernels = Annotated[str | None, typer.Option(help="timed: time the kernels first; default: take the usual ones.")]
_NumTokens = Annotated[int | None, typer.Option(help="Tokens per step at most.", min=1)]


@bench_app.command()
def throughput(  # noqa: PLR0913 - one parameter per option
    model: _Model = None,
    hf_config: _HfConfig = None,
    load_format: _LoadFormat = "auto",
    isl: _Isl = 128,
    osl: _Osl = 64,
    num_requests: Annotated[int, typer.Option(help="Requests to measure.", min=1)] = 16,
    concurrency: Annotated[int, typer.Option(help="Requests in flight at once; 0: all.", min=0)] = 0,
    dtype: DtypeOption = "auto",
    max_batch_size: _BatchSize = None,
    max_num_tokens: _NumTokens = None,
    kernel_selection: _Kernels = None,
    warmup: _Warmup = 1,
    report_json: _Report = None,
) -> None:
    """Tokens per second with many requests in flight."""
    from lamella.cli.bench import BenchPlan, run_bench

    source = _bench_source(model, hf_config)
    run_bench(
        BenchPlan(
            mode="throughput", model=source, load_format=load_format, dtype=dtype, isl=isl, osl=osl,
            num_requests=num_requests, concurrency=concurrency or num_requests, warmup=warmup,
            max_batch_size=max_batch_size, max_num_tokens=max_num_tokens, kernel_selection=kernel_selection,
        ),
        report_json,
    )  # fmt: skip


@bench_app.command()
def latency(  # noqa: PLR0913 - one parameter per option
    model: _Model = None,
    hf_config: _HfConfig = None,
    load_format: _LoadFormat = "auto",
    isl: _Isl = 128,
    osl: _Osl = 64,
    num_requests: Annotated[int, typer.Option(help="Requests to measure, one after the other.", min=1)] = 5,
    dtype: DtypeOption = "auto",
    max_num_tokens: _NumTokens = None,
    kernel_selection: _Kernels = None,
    warmup: _Warmup = 1,
    report_json: _Report = None,
) -> None:
    """Time per request and per token with one request at a time."""
    from lamella.cli.bench import BenchPlan, run_bench

    source = _bench_source(model, hf_config)
    run_bench(
        BenchPlan(
            mode="latency", model=source, load_format=load_format, dtype=dtype, isl=isl, osl=osl,
            num_requests=num_requests, concurrency=1, warmup=warmup, max_batch_size=1, max_num_tokens=max_num_tokens,
            kernel_selection=kernel_selection,
        ),
        report_json,
    )  # fmt: skip


def _bench_source(model: str | None, hf_config: Path | None) -> str:
    if (model is None) == (hf_config is None):
        raise typer.BadParameter("give either --model, or --hf-config (with --load-format dummy)")
    return model if model is not None else str(hf_config)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this machine can run, what is missing, and the command that adds it."""
    from lamella.cli.doctor import run_doctor

    run_doctor(as_json=as_json)


@app.command()
def check(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    text_file: Annotated[Path | None, typer.Option(help="Text for the perplexity; default: a built-in one.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Greedy tokens to compare per prompt.", min=1)] = 32,
    dtype: DtypeOption = "float32",
    tolerance: Annotated[
        float, typer.Option(help="Largest error of a logit, relative to the largest logit.", min=0)
    ] = 1e-3,
) -> None:
    """Compare logits, greedy tokens and perplexity with transformers; exit code 1 if they differ."""
    from lamella.cli.check import run_check

    try:
        text = text_file.read_text(encoding="utf-8") if text_file is not None else None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text-file: {text_file} is not UTF-8 text ({error})") from error
    if not run_check(hf_dir, text=text, max_tokens=max_tokens, dtype=dtype, tolerance=tolerance):
        raise typer.Exit(1)
