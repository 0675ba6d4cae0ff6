"""Options of every command that opens a model on several ranks; spelled as other tools of the field spell them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

TpOption = Annotated[
    int | None,
    typer.Option(
        "--tp-size", "--tp_size", "--tp", "--tensor-parallel-size", "--tensor_parallel_size", min=1,
        help="Ranks that share each layer.",
    ),
]  # fmt: skip
PpOption = Annotated[
    int | None,
    typer.Option(
        "--pp-size", "--pp_size", "--pp", "--pipeline-parallel-size", "--pipeline_parallel_size", min=1,
        help="Pipeline stages.",
    ),
]  # fmt: skip
EpOption = Annotated[
    int | None,
    typer.Option(
        "--ep-size", "--ep_size", "--ep", "--moe-ep-size", "--moe_ep_size", min=1,
        help="Groups that the tensor-parallel ranks share experts out to.",
    ),
]  # fmt: skip
AutoParallelOption = Annotated[
    bool, typer.Option("--auto-parallel", "--auto_parallel", help="Choose the sizes for --world-size ranks.")
]
WorldSizeOption = Annotated[
    int | None,
    typer.Option("--world-size", "--world_size", min=1, help="Ranks for --auto-parallel; default: all GPUs."),
]
GpusPerNodeOption = Annotated[
    int | None, typer.Option("--gpus-per-node", "--gpus_per_node", min=1, help="Ranks of one machine.")
]


def sizes(
    tp_size: int | None,
    pp_size: int | None,
    ep_size: int | None,
    auto_parallel: bool,
    world_size: int | None,
    gpus_per_node: int | None,
) -> dict[str, Any]:
    """Returns the keyword arguments of `LLM` for these options."""
    return {
        "tensor_parallel_size": tp_size,
        "pipeline_parallel_size": pp_size,
        "moe_expert_parallel_size": ep_size,
        "auto_parallel": auto_parallel,
        "world_size": world_size,
        "gpus_per_node": gpus_per_node,
    }
