"""Options of ``lamella bench``. Imports no torch, so that ``--help`` answers at once.

Names are those of trtllm-bench and ``vllm bench`` where they have one; underscores may stand for the dashes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.sizes import (
    AutoParallelOption,
    EpOption,
    GpusPerNodeOption,
    PpOption,
    TpOption,
    WorldSizeOption,
    sizes,
)

bench_app = typer.Typer(
    help="Measure throughput or latency.",
    no_args_is_help=True,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)

_HfConfig = Annotated[
    Path | None, typer.Option(help="Directory with a config.json; with --load-format dummy no weights are needed.")
]
_Model = Annotated[str | None, typer.Option(help="Model to measure: hub id, directory, checkpoint or engine.")]
_LoadFormat = Annotated[str, typer.Option(help="auto, or dummy: random weights from config.json alone.")]
_Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
_Quant = Annotated[
    str | None, typer.Option("--quant", "--quantization", help="fp8, or another QuantAlgo by name; default: none.")
]
_KvDtype = Annotated[str, typer.Option(help="auto (the model's) or fp8.")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
_Isl = Annotated[int, typer.Option("--isl", "--input-len", help="Tokens of each prompt.", min=1)]
_Osl = Annotated[int, typer.Option("--osl", "--output-len", help="Tokens generated per prompt.", min=1)]
_Report = Annotated[
    Path | None,
    typer.Option("--report-json", "--json", "--output-json", help="Write everything that was measured to this file."),
]
_BatchSize = Annotated[int | None, typer.Option(help="Requests per step at most.", min=1)]
_NumTokens = Annotated[int | None, typer.Option(help="Tokens per step at most.", min=1)]
_SeqLen = Annotated[int | None, typer.Option(help="Tokens per request; default with --hf-config: isl + osl.", min=2)]
_Kernels = Annotated[
    str | None,
    typer.Option(help="timed: time the kernels first; default: take the usual ones. Default: timed on a GPU."),
]
_BlockSize = Annotated[
    int | None, typer.Option("--tokens-per-block", "--block-size", help="Tokens of a KV block, a power of two.", min=1)
]
_Attention = Annotated[str, typer.Option(help="auto; on a GPU also triton, flashinfer or torch.")]
_Policy = Annotated[
    str | None, typer.Option(help="predicted_peak, guaranteed_no_evict, max_utilization or static_batch.")
]
_Fraction = Annotated[
    float | None,
    typer.Option(
        "--kv-cache-free-gpu-mem-fraction",
        "--free-gpu-memory-fraction",
        help="Part of the GPU memory left by weights and steps that the KV cache may take.",
    ),
]
_Utilization = Annotated[
    float | None, typer.Option(help="Part of the GPU's memory that weights, steps and KV cache may take together.")
]
_Seed = Annotated[int, typer.Option(help="Of the random prompts.")]
_Warmup = Annotated[
    int | None, typer.Option("--warmup", "--num-iters-warmup", help="Requests (latency: runs) before the clock.", min=0)
]
_LogLevel = Annotated[str, typer.Option(help="What the engine tells on stderr: debug, info, warning or error.")]
_Breakdown = Annotated[bool, typer.Option(help="Run some more steps to say where their time goes.")]


@bench_app.command()
def throughput(  # noqa: PLR0913 - one parameter per option
    model: _Model = None,
    hf_config: _HfConfig = None,
    load_format: _LoadFormat = "auto",
    isl: _Isl = 128,
    osl: _Osl = 64,
    num_requests: Annotated[int, typer.Option("--num-requests", "--num-prompts", help="Requests.", min=1)] = 16,
    concurrency: Annotated[int, typer.Option(help="Requests in flight at once; below 1: all.", min=-1)] = 0,
    dtype: _Dtype = "auto",
    quant: _Quant = None,
    kv_cache_dtype: _KvDtype = "auto",
    device: _Device = "auto",
    max_batch_size: _BatchSize = None,
    max_num_tokens: _NumTokens = None,
    max_seq_len: _SeqLen = None,
    tokens_per_block: _BlockSize = None,
    scheduler_policy: _Policy = None,
    kv_cache_free_gpu_mem_fraction: _Fraction = None,
    gpu_memory_utilization: _Utilization = None,
    attn_backend: _Attention = "auto",
    kernel_selection: _Kernels = None,
    warmup: _Warmup = None,
    tp_size: TpOption = None,
    pp_size: PpOption = None,
    ep_size: EpOption = None,
    auto_parallel: AutoParallelOption = False,
    world_size: WorldSizeOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    seed: _Seed = 0,
    breakdown: _Breakdown = True,
    report_json: _Report = None,
    log_level: _LogLevel = "info",
) -> None:
    """Tokens per second, all requests queued at once (or --concurrency of them in flight)."""
    started = time.perf_counter()
    source = _source(model, hf_config)
    from lamella.cli.bench.plan import BenchPlan
    from lamella.cli.bench.run import run_bench

    plan = BenchPlan(
        mode="throughput", model=source, config_only=hf_config is not None, load_format=load_format, dtype=dtype,
        quant=quant, kv_cache_dtype=kv_cache_dtype, device=device, isl=isl, osl=osl, num_requests=num_requests,
        concurrency=concurrency if concurrency > 0 else num_requests, warmup=warmup, max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens, max_seq_len=max_seq_len, tokens_per_block=tokens_per_block,
        scheduler_policy=scheduler_policy, free_gpu_memory_fraction=kv_cache_free_gpu_mem_fraction,
        gpu_memory_utilization=gpu_memory_utilization, attn_backend=attn_backend,
        kernel_selection=kernel_selection, seed=seed, breakdown=breakdown,
        sizes=sizes(tp_size, pp_size, ep_size, auto_parallel, world_size, gpus_per_node),
    )  # fmt: skip
    run_bench(plan, report_json, started, log_level)


@bench_app.command()
def latency(  # noqa: PLR0913 - one parameter per option
    model: _Model = None,
    hf_config: _HfConfig = None,
    load_format: _LoadFormat = "auto",
    isl: _Isl = 128,
    osl: _Osl = 64,
    batch_size: Annotated[int, typer.Option(help="Requests that run side by side.", min=1)] = 1,
    num_runs: Annotated[
        int, typer.Option("--num-runs", "--num-iters", "--num-requests", help="Runs; the median counts.", min=1)
    ] = 5,
    dtype: _Dtype = "auto",
    quant: _Quant = None,
    kv_cache_dtype: _KvDtype = "auto",
    device: _Device = "auto",
    max_num_tokens: _NumTokens = None,
    max_seq_len: _SeqLen = None,
    tokens_per_block: _BlockSize = None,
    kv_cache_free_gpu_mem_fraction: _Fraction = None,
    gpu_memory_utilization: _Utilization = None,
    attn_backend: _Attention = "auto",
    kernel_selection: _Kernels = None,
    warmup: _Warmup = None,
    tp_size: TpOption = None,
    pp_size: PpOption = None,
    ep_size: EpOption = None,
    auto_parallel: AutoParallelOption = False,
    world_size: WorldSizeOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    seed: _Seed = 0,
    breakdown: _Breakdown = True,
    report_json: _Report = None,
    log_level: _LogLevel = "info",
) -> None:
    """Time per output token of a fixed batch: (T(osl) - T(1)) / (osl - 1), the median of several runs."""
    started = time.perf_counter()
    source = _source(model, hf_config)
    from lamella.cli.bench.plan import BenchPlan
    from lamella.cli.bench.run import run_bench

    plan = BenchPlan(
        mode="latency", model=source, config_only=hf_config is not None, load_format=load_format, dtype=dtype,
        quant=quant, kv_cache_dtype=kv_cache_dtype, device=device, isl=isl, osl=osl, num_requests=num_runs,
        concurrency=batch_size, warmup=warmup, max_batch_size=batch_size, max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len, tokens_per_block=tokens_per_block,
        free_gpu_memory_fraction=kv_cache_free_gpu_mem_fraction, gpu_memory_utilization=gpu_memory_utilization,
        attn_backend=attn_backend, kernel_selection=kernel_selection, seed=seed, breakdown=breakdown,
        sizes=sizes(tp_size, pp_size, ep_size, auto_parallel, world_size, gpus_per_node),
    )  # fmt: skip
    run_bench(plan, report_json, started, log_level)


def _source(model: str | None, hf_config: Path | None) -> str:
    if (model is None) == (hf_config is None):
        raise typer.BadParameter("give either --model, or --hf-config (with --load-format dummy)")
    return model if model is not None else str(hf_config)
