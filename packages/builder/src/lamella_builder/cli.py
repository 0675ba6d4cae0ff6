"""The command ``lamella-build``: a model or checkpoint directory in, an engine directory out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from lamella_builder.sizes import ParallelSizes, parse_partition
from lamella_core.engine import BuildConfig
from lamella_core.errors import ConfigError, LamellaError
from lamella_core.quantization.config import parse_options

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
LOG_LEVELS = ("debug", "info", "warning", "error")


def _option(name: str, text: str) -> Any:
    """Returns an option that may be spelled with underscores or with dashes."""
    return typer.Option(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=text)


@app.command()
def lamella_build(  # noqa: PLR0913 - one parameter per option of the command
    model: Annotated[str | None, _option("model", "Hugging Face directory or hub id.")] = None,
    checkpoint_dir: Annotated[str | None, _option("checkpoint_dir", "Lamella checkpoint directory.")] = None,
    output_dir: Annotated[Path, _option("output_dir", "Engine directory to write.")] = Path("engine_output"),
    dtype: Annotated[str | None, _option("dtype", "float32, float16 or bfloat16; default: the model's.")] = None,
    device: Annotated[str | None, _option("device", "cpu, cuda, or auto: a GPU if there is one (default).")] = None,
    max_batch_size: Annotated[int | None, _option("max_batch_size", "Requests that run in one step.")] = None,
    max_num_tokens: Annotated[int | None, _option("max_num_tokens", "Tokens computed in one step.")] = None,
    opt_num_tokens: Annotated[int | None, _option("opt_num_tokens", "Step size to choose kernels for.")] = None,
    max_seq_len: Annotated[int | None, _option("max_seq_len", "Tokens of a request, prompt and output.")] = None,
    max_beam_width: Annotated[int | None, _option("max_beam_width", "Beams that a request may hold.")] = None,
    max_input_len: Annotated[int | None, _option("max_input_len", "Tokens of a prompt.")] = None,
    kv_cache_type: Annotated[str | None, _option("kv_cache_type", "paged, continuous or disabled.")] = None,
    tokens_per_block: Annotated[int | None, _option("tokens_per_block", "Tokens of a KV block.")] = None,
    kernel_selection: Annotated[str | None, _option("kernel_selection", "timed or default.")] = None,
    tp_size: Annotated[int | None, _option("tp_size", "Tensor-parallel ranks.")] = None,
    pp_size: Annotated[int | None, _option("pp_size", "Pipeline stages.")] = None,
    moe_tp_size: Annotated[int | None, _option("moe_tp_size", "Ranks that share an expert; -1: derived.")] = None,
    moe_ep_size: Annotated[int | None, _option("moe_ep_size", "Ranks that share the experts out; -1: derived.")] = None,
    pp_partition: Annotated[str | None, _option("pp_partition", "Layers of each stage, such as 20,12.")] = None,
    auto_parallel: Annotated[bool, _option("auto_parallel", "Choose sizes for --world_size ranks; say why.")] = False,
    world_size: Annotated[int | None, _option("world_size", "Ranks in all; needed by --auto_parallel.")] = None,
    gpus_per_node: Annotated[int | None, _option("gpus_per_node", "Ranks of one machine; default: 8.")] = None,
    workers: Annotated[int, _option("workers", "Ranks built at once, each in its own process.")] = 1,
    quant: Annotated[str | None, _option("quant", "fp8 or fp8_per_channel_per_token; default: as they are.")] = None,
    kv_cache_dtype: Annotated[str, _option("kv_cache_dtype", "auto (as the weights say) or fp8.")] = "auto",
    load_format: Annotated[str, _option("load_format", "auto, or dummy for random weights.")] = "auto",
    dry_run: Annotated[bool, _option("dry_run", "Print the memory plan and stop.")] = False,
    log_level: Annotated[str, _option("log_level", "debug, info, warning or error.")] = "warning",
) -> None:
    """Builds an engine: casts, lays the weights out and chooses kernels for this machine."""
    limits: dict[str, Any] = {
        "dtype": dtype, "device": device, "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens,
        "opt_num_tokens": opt_num_tokens, "max_seq_len": max_seq_len, "max_beam_width": max_beam_width,
        "max_input_len": max_input_len, "kv_cache_type": kv_cache_type, "tokens_per_block": tokens_per_block,
        "kernel_selection": kernel_selection,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "tp_size": tp_size, "pp_size": pp_size, "moe_tp_size": moe_tp_size, "moe_ep_size": moe_ep_size,
        "auto_parallel": auto_parallel, "world_size": world_size, "gpus_per_node": gpus_per_node,
    }  # fmt: skip
    if (model is None) == (checkpoint_dir is None):
        raise typer.BadParameter("pass either --model or --checkpoint_dir")
    err = Console(stderr=True)
    with _one_line_errors(err):
        _configure_logging(log_level, err)
        request = {
            "model": checkpoint_dir if model is None else model,
            "output_dir": output_dir,
            "build_config": BuildConfig(**{name: value for name, value in limits.items() if value is not None}),
            "sizes": ParallelSizes(**sizes, pp_partition=parse_partition(pp_partition)),
            "workers": workers,
            "load_format": load_format,
            "quant_config": parse_options(quant, kv_cache_dtype),
        }
        _run(request, dry_run, Console(soft_wrap=True), err)


@contextmanager
def _one_line_errors(err: Console) -> Iterator[None]:
    try:
        yield
    except LamellaError as error:
        err.print(f"lamella-build: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _run(request: dict[str, Any], dry_run: bool, out: Console, err: Console) -> None:
    from lamella_builder import job, report  # import torch: `lamella-build --help` answers without

    work = job.BuildJob(job.BuildRequest(**request))
    if work.choice is not None:
        out.print(work.choice.explain(), markup=False, highlight=False)
    report.show_plan(out, work.config, work.build_config, work.plan)
    work.plan.check()
    if dry_run:
        return
    with report.progress_bars(err) as progress:
        seconds = work.run(progress)
    report.show_seconds(out, seconds)
    out.print(f"engine written to {request['output_dir']}", markup=False, highlight=False)
    if work.config.mapping.world_size > 1:
        ranks = work.config.mapping.world_size
        out.print(f"it has {ranks} ranks and needs as many processes to run, which LLM starts itself", highlight=False)


def _configure_logging(level: str, console: Console) -> None:
    if level.lower() not in LOG_LEVELS:
        raise ConfigError(f"--log_level is {level!r}; allowed: {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=level.upper(), handlers=[RichHandler(console=console)], format="%(message)s")


def main() -> None:
    """Runs the command; an interruption leaves no trace and exits with 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
