"""Gated experts on the device: products over tokens grouped by expert, with nothing read by the host.

Tokens are sorted by expert (`moe_align`). The product with gate and up has the gated activation in it, and quantizes
its result where the scale is known; the product with down multiplies by the token's weight for the expert. Both write
one row per assignment of a token to an expert, and a last kernel adds up the rows of each token in the order of its
choices: the same bits every time, as nothing is added atomically. Only the weights of experts that are hit are read.

Shape legend: T tokens, A = T * top_k assignments, E experts of this rank, H hidden size, I inner size, N outputs and K
inputs of a projection.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_core.kernels.experts import ExpertProjection, ExpertStack, Swiglu
from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    is_interpreted,
    launch_options,
    next_power_of_2,
    use_pdl,
)
from lamella_core.kernels.triton.moe_align import Blocks, Rows, make_blocks, needs_sorting
from lamella_core.kernels.triton.moe_kernels import product_kernel, quantize_kernel, sum_kernel
from lamella_core.kernels.triton.moe_sorted import SortedTile, sorted_experts, takes
from lamella_core.kernels.triton.quantize import quantize_fp8_per_token

FLOAT8 = torch.float8_e4m3fn
_SHARED_RESERVE = 2048  # bytes of shared memory for anything but numbers of a turn
COLUMNS = 1024  # of a row per program, where rows are only added or rounded
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product divides the work.

    Attributes:
        block_m: rows per program, all of one expert.
        block_n: outputs per program.
        block_bytes: of each weight row per turn.
        num_warps: warps per program.
        num_stages: turns whose numbers are in shared memory or on their way to it, at most.
        swap: the weight is the left operand of the matrix units, for few rows.
        group: blocks of rows that meet the same outputs one after the other.
    """

    block_m: int
    block_n: int
    block_bytes: int
    num_warps: int
    num_stages: int
    swap: bool = False
    group: int = 8


# Largest average of rows per expert -> tiles. Up to a few dozen rows reading weights takes the time, then multiplying.
# Measured on an H200 in bfloat16, whole calls of `benchmarks/gpu_moe.py`. Against 128 x 128 of 4 stages at the sizes of
# Mixtral 8x7B, 128 x 256 takes 729 instead of 768 us at 64 rows, 997 for 1031 at 128, 1599 for 1824 at 256 and 5482 for
# 6434 (527 TFLOP/s) at 1024; Qwen3 30B-A3B 377 for 409 at 64 and 781 for 923 at 256. A fourth stage fits and is slower
# (5875 at 1024). At 32 rows of Qwen3 the third row is best (313), 128 x 256 takes 353.
TILES: tuple[tuple[float, Tile], ...] = (
    (12, Tile(block_m=16, block_n=64, block_bytes=256, num_warps=4, num_stages=4, swap=True, group=64)),
    (24, Tile(block_m=32, block_n=64, block_bytes=256, num_warps=4, num_stages=4, swap=True, group=64)),
    (48, Tile(block_m=64, block_n=128, block_bytes=128, num_warps=8, num_stages=4, swap=True)),
    (float("inf"), Tile(block_m=128, block_n=256, block_bytes=128, num_warps=8, num_stages=3, group=16)),
)
# Float32 has no matrix units here, and its sums fill the registers sooner.
FLOAT32_TILE = Tile(block_m=16, block_n=64, block_bytes=128, num_warps=4, num_stages=2)
# From so many rows per expert on they are sorted first, on Hopper. On an H100 in bfloat16, whole calls take Mixtral
# 8x7B at 256, 512, 1024 and 2048 rows 1573, 2675, 4796 and 9075 us (636 TFLOP/s), unsorted 1596, 2885, 5374 and 10569;
# Qwen3 30B-A3B at 256 and 512 rows 917 and 1475, unsorted 870 and 1462.
LEAST_SORTED_ROWS = 512
SORTED_TILE = SortedTile(block_m=128, block_n=256, block_bytes=128, num_warps=8, num_stages=3)


def default_tile(tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
    """Returns the tile for products over so many tokens, each with ``top_k`` of the model's experts.

    One tile serves both products: they share the order of rows.
    """
    if dtype == torch.float32:
        return FLOAT32_TILE
    rows = rows_per_expert(tokens, top_k, num_experts)
    return next(tile for most, tile in TILES if rows <= most)


def rows_per_expert(tokens: int, top_k: int, num_experts: int) -> float:
    """Returns how many rows an expert that is hit has, on average."""
    return tokens * top_k / max(1, min(num_experts, tokens * top_k))


def best_tile(x: Tensor, experts: Tensor, stack: ExpertStack) -> Tile | SortedTile:
    """Returns how to divide the work of `gated_experts`."""
    (tokens, top_k), dtype = experts.shape, stack.gate_up.weight.dtype
    if rows_per_expert(tokens, top_k, stack.num_experts) >= LEAST_SORTED_ROWS and takes(x, stack):
        return SORTED_TILE
    return default_tile(tokens, top_k, stack.num_experts, dtype)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Returns the shared memory of one program at most."""
    if is_interpreted() or device.type != "cuda":
        return 1 << 30
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def fitting(tile: Tile, device: torch.device) -> Tile:
    """Returns the tile with as many stages as the device's shared memory holds."""
    stage = (tile.block_m + tile.block_n) * tile.block_bytes
    most = max(1, (_shared_bytes(device) - _SHARED_RESERVE) // stage)
    return tile if tile.num_stages <= most else replace(tile, num_stages=most)


def gated_experts(
    x: Tensor, experts: Tensor, weights: Tensor, stack: ExpertStack, tile: Tile | SortedTile | None = None
) -> Tensor:
    """Returns this rank's part of the weighted sum over each token's experts: [T, H] in x's dtype.

    Args:
        x: [T, H] float32, bfloat16 or float16.
        experts: numbers of each token's experts, of the whole model, [T, top_k] int64.
        weights: of those experts, [T, top_k] float32.
        stack: this rank's experts.
        tile: how to divide the work, sorted where that is possible (`takes`); None: `default_tile`.
    """
    tokens, top_k = experts.shape
    if not tokens:
        return torch.empty_like(x)
    experts, weights = experts.contiguous(), weights.contiguous()
    up, down = stack.gate_up, stack.down
    tile = tile or best_tile(x, experts, stack)
    if isinstance(tile, SortedTile):
        if takes(x, stack):
            return sorted_experts(x, experts, weights, stack, tile)
        tile = default_tile(tokens, top_k, stack.num_experts, up.weight.dtype)
    tile = fitting(tile, x.device)
    if needs_sorting(tokens, top_k, stack.num_experts):
        blocks = make_blocks(experts, stack.first, stack.held, tile.block_m)
    else:
        blocks = Blocks(experts.numel(), experts)
    if stack.scale_inputs:
        rows = (x.unsqueeze(1) * weights.to(x.dtype).unsqueeze(-1)).flatten(0, 1)
    else:
        rows = x if x.stride(1) == 1 else x.contiguous()
    call = _Call(blocks, tile, stack.first, stack.held, x.dtype)
    gate_out_scale = down.input_scale if stack.gate is not None else None
    inner = call.product(call.inputs(rows, up), up, stack.gate, gate_out_scale)
    if stack.gate is None:
        inner = stack.activation(inner)
    parts = call.product(call.inputs(inner, down), down, token_weights=None if stack.scale_inputs else weights)
    return call.sums(parts)


@dataclass(frozen=True, slots=True)
class _Call:
    """What the kernels of one call share."""

    blocks: Blocks
    tile: Tile
    first: int  # expert of this rank
    held: int  # experts of this rank
    dtype: torch.dtype  # of inputs, results and, where nothing is quantized, everything between

    def inputs(self, rows: Tensor, projection: ExpertProjection) -> Rows:
        """Returns rows [A, K] or [A / top_k, K] as the projection's weight takes them."""
        if projection.weight.dtype != FLOAT8:
            return Rows(rows)
        if projection.input_scale is None:
            values, scales = quantize_fp8_per_token(rows)
            return Rows(values, scales, per_row=True)
        values = rows if rows.dtype == FLOAT8 else self._quantized(rows, projection.input_scale)
        return Rows(values, projection.input_scale)

    def _quantized(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Returns the inputs [A, K] of all assignments, each divided by its expert's scale."""
        count, width = self.blocks.experts.numel(), rows.shape[1]
        out = torch.empty((count, width), dtype=FLOAT8, device=rows.device)
        quantize_kernel[(count, -(-width // COLUMNS))](
            rows, scales, self.blocks.experts, float8_storage(out), self.first, rows.stride(0),
            SHARE=count // rows.shape[0], HELD=self.held, WIDTH=width, BLOCK=COLUMNS,
            NATIVE_FLOAT8=has_float8(), USE_PDL=use_pdl(), num_warps=4, **launch_options(),
        )  # fmt: skip
        return out

    def product(
        self,
        x: Rows,
        projection: ExpertProjection,
        gate: Swiglu | None = None,
        out_scale: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the result of each assignment [A, N], or [A, N / 2] of the gate; in float8 by ``out_scale`` [E]."""
        _, n, k = projection.weight.shape
        total = self.blocks.experts.numel()
        scale, is_float8 = projection.weight_scale, projection.weight.dtype == FLOAT8
        width, dtype = n if gate is None else n // 2, self.dtype if out_scale is None else FLOAT8
        out = torch.empty((total, width), dtype=dtype, device=x.values.device)
        tile = self.tile
        product_kernel[(self.blocks.count * -(-n // tile.block_n),)](
            float8_storage(x.values) if is_float8 else x.values,
            float8_storage(projection.weight) if is_float8 else projection.weight,
            out if out_scale is None else float8_storage(out),
            projection.bias, x.scale, scale, out_scale, token_weights,
            self.blocks.experts, self.blocks.rows, self.blocks.expert_of,
            total, self.blocks.count, self.first, x.values.stride(0),
            SHARE=total // x.values.shape[0], HELD=self.held, N=n, K=k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_bytes // projection.weight.element_size(), GROUP=tile.group, STAGES=tile.num_stages,
            SWAP=tile.swap, DTYPE=_TRITON_DTYPES[self.dtype], SCALE_PER_ROW=x.per_row,
            SCALE_PER_COL=scale is not None and scale.dim() > 1,
            GATE=None if gate is None else (gate.alpha, gate.offset, gate.limit),
            NATIVE_FLOAT8=has_float8(), USE_PDL=use_pdl(),
            num_warps=tile.num_warps, **launch_options(),
        )  # fmt: skip
        return out

    def sums(self, parts: Tensor) -> Tensor:
        """Returns the sum of each token's results [A, H]: [T, H]."""
        (tokens, top_k), width = self.blocks.experts.shape, parts.shape[1]
        out = torch.empty((tokens, width), dtype=parts.dtype, device=parts.device)
        block = min(COLUMNS, next_power_of_2(width))
        sum_kernel[(tokens, -(-width // block))](
            parts, self.blocks.experts, None, None, out, self.first,
            HELD=self.held, TOP_K=top_k, WIDTH=width, BLOCK=block, USE_PDL=use_pdl(), num_warps=4, **launch_options(),
        )  # fmt: skip
        return out
