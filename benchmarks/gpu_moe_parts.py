"""What a call of experts' products spends on each of its kernels, for `gpu_moe`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_matmul import seconds

from lamella_core.kernels.experts import ExpertStack
from lamella_core.kernels.triton import moe
from lamella_core.kernels.triton.moe import Tile
from lamella_core.kernels.triton.moe_align import Blocks, make_blocks
from lamella_core.kernels.triton.moe_sorted import SortedCall, SortedTile

Routes = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Parts:
    """Microseconds of each kernel alone; ``copy`` is of sorted rows alone."""

    model: str
    tokens: int
    tile: str
    sort: float
    copy: float
    gate_up: float
    down: float
    sums: float
    gate_up_tflops: float
    down_tflops: float

    def line(self) -> str:
        return (
            f"  T={self.tokens:<5} {self.tile:<30} sort {self.sort:5.1f}  copy {self.copy:6.1f}  "
            f"gate_up {self.gate_up:7.1f} ({self.gate_up_tflops:3.0f})  "
            f"down {self.down:7.1f} ({self.down_tflops:3.0f})  sum {self.sums:6.1f}"
        )


def time_parts(
    model: str, name: str, x: torch.Tensor, routes: Routes, stacks: list[ExpertStack], tile: Tile | SortedTile
) -> Parts:
    """Times the kernels of one tile; each launch has the next routing and copy of the weights."""
    launches, (tokens, top_k) = len(routes), routes[0][0].shape
    stack, is_sorted = stacks[0], isinstance(tile, SortedTile)
    if isinstance(tile, Tile):
        tile = moe.fitting(tile, x.device)

    def blocks(index: int) -> Blocks:
        return make_blocks(routes[index][0], stack.first, stack.held, tile.block_m)

    kind = SortedCall if is_sorted else moe._Call
    calls = [kind(blocks(index), tile, stack.first, stack.held, x.dtype) for index in range(launches)]

    def us(run: Callable[[int], object]) -> float:
        return seconds(run, launches) * 1e6

    def stack_of(index: int) -> ExpertStack:
        return stacks[index % len(stacks)]

    inputs = calls[0].inputs(x, stack.gate_up)
    rows = [call.inputs(x, stack.gate_up) for call in calls] if is_sorted else [inputs] * launches
    gate_up = us(lambda i: calls[i].product(rows[i], stack_of(i).gate_up, stack.gate))
    inner = [calls[i].product(rows[i], stack.gate_up, stack.gate) for i in range(launches)]
    ready = [c.sorted_inputs(r, stack.down) if is_sorted else c.inputs(r, stack.down) for c, r in zip(calls, inner)]
    down = us(lambda i: calls[i].product(ready[i], stack_of(i).down))
    parts = [calls[i].product(ready[i], stack.down) for i in range(launches)]
    if is_sorted:
        sums = us(lambda i: calls[i].sums(parts[i], routes[i][1]))
    else:
        sums = us(lambda i: calls[i].sums(parts[i]))
    copy = us(lambda i: calls[i].inputs(x, stack.gate_up)) if is_sorted else 0.0
    flop = 2.0 * tokens * top_k * stack.down.weight[0].numel()
    return Parts(
        model, tokens, name, us(blocks), copy, gate_up, down, sums, 2 * flop / gate_up / 1e6, flop / down / 1e6
    )  # fmt: skip
