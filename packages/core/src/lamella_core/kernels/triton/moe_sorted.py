"""The way of `lamella_core.kernels.triton.moe` where experts meet many rows, on Hopper.

Rows are copied first, so that those of one expert lie together (and rounded to float8 on the way, where their scale is
known). Then both operands are plain boxes of memory, which the chip's copy engine moves to shared memory without the
help of threads; results leave the same way. Every block of the second product's rows is where the first one left it;
the last kernel finds each token's rows again, weights them, and adds them up in the order of the token's choices.

Shape legend: T tokens, A = T * top_k assignments, R sorted rows (of whole blocks), E experts of this rank, N outputs
and K inputs of a projection.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lamella_core.kernels.experts import ExpertProjection, ExpertStack, Swiglu
from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    has_wgmma,
    is_interpreted,
    launch_options,
    next_power_of_2,
    use_pdl,
)
from lamella_core.kernels.triton.moe_align import Blocks, Rows, make_blocks
from lamella_core.kernels.triton.moe_kernels import sum_kernel
from lamella_core.kernels.triton.moe_sorted_kernels import sorted_product_kernel, spread_kernel
from lamella_core.kernels.triton.quantize import quantize_fp8_per_token

FLOAT8 = torch.float8_e4m3fn
ALIGNMENT = 16  # bytes: what the copy engine asks of the beginning of a row
COLUMNS = 1024  # of a row per program, where rows are only copied or added
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class SortedTile:
    """How a product over sorted rows divides the work.

    Attributes:
        block_m: rows of a block, all of one expert.
        block_n: outputs of a block; of gate and up together.
        block_bytes: of each row per turn.
        num_warps: warps per program.
        num_stages: turns whose numbers are in shared memory or on their way to it.
        group: blocks of rows that meet the same outputs one after the other.
        resident: programs per multiprocessor, each of which computes many blocks; 0: a program per block.
        flatten: loads of a program's next block begin before the block before it is stored.
    """

    block_m: int
    block_n: int
    block_bytes: int
    num_warps: int
    num_stages: int
    group: int = 16
    resident: int = 1
    flatten: bool = True


def takes(x: Tensor, stack: ExpertStack) -> bool:
    """Whether sorted products compute these experts: on Hopper, if they are such as `suits` wants."""
    return (has_wgmma() or is_interpreted()) and suits(x.dtype, stack)


def suits(dtype: torch.dtype, stack: ExpertStack) -> bool:
    """Whether sorted products of rows of this dtype are made for these experts: the copy engine moves whole units.

    Rounding to float8 by constants is part of the copy and of the gate: what is between other activations is not.
    """
    projections = (stack.gate_up, stack.down)
    if stack.gate is None and stack.down.input_scale is not None:
        return False
    dtypes = {projection.weight.dtype for projection in projections}
    if dtype == torch.float32 or len(dtypes) > 1 or torch.float32 in dtypes:
        return False
    widths = [width for projection in projections for width in projection.weight.shape[1:]]
    widths.append(stack.down.weight.shape[2])
    size = min(dtype.itemsize, *(weight.itemsize for weight in dtypes))
    return all(width * size % ALIGNMENT == 0 for width in widths) and all(
        projection.weight.data_ptr() % ALIGNMENT == 0 and projection.weight.is_contiguous()
        for projection in projections
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return (
        2
        if is_interpreted() or device.type != "cuda"
        else torch.cuda.get_device_properties(device).multi_processor_count
    )


def sorted_experts(x: Tensor, experts: Tensor, weights: Tensor, stack: ExpertStack, tile: SortedTile) -> Tensor:
    """Returns what `lamella_core.kernels.triton.moe.gated_experts` does, of contiguous experts and weights.

    Requires `takes`.
    """
    up, down = stack.gate_up, stack.down
    call = SortedCall(
        make_blocks(experts, stack.first, stack.held, tile.block_m), tile, stack.first, stack.held, x.dtype
    )
    if stack.scale_inputs:
        rows = (x.unsqueeze(1) * weights.to(x.dtype).unsqueeze(-1)).flatten(0, 1)
    else:
        rows = x if x.stride(1) == 1 else x.contiguous()
    inputs = call.inputs(rows, up)
    gate_out_scale = down.input_scale if stack.gate is not None else None
    inner = call.product(inputs, up, stack.gate, gate_out_scale)
    if stack.gate is None:
        inner = stack.activation(inner)
    parts = call.product(call.sorted_inputs(inner, down), down)
    return call.sums(parts, None if stack.scale_inputs else weights)


@dataclass(frozen=True, slots=True)
class SortedCall:
    """What the kernels of one call share."""

    blocks: Blocks
    tile: SortedTile
    first: int  # expert of this rank
    held: int  # experts of this rank
    dtype: torch.dtype  # of inputs, results and, where nothing is quantized, everything between

    @property
    def num_rows(self) -> int:
        """R."""
        return self.blocks.count * self.tile.block_m

    def inputs(self, rows: Tensor, projection: ExpertProjection) -> Rows:
        """Returns rows [A, K] or [A / top_k, K] sorted, as the projection's weight takes them."""
        if projection.weight.dtype != FLOAT8:
            return Rows(self.spread(rows))
        if projection.input_scale is not None:
            return Rows(self.spread(rows, by_expert=projection.input_scale), projection.input_scale)
        values, scales = quantize_fp8_per_token(rows)
        sorted_scales = torch.empty(self.num_rows, dtype=torch.float32, device=rows.device)
        return Rows(self.spread(values, moved=(scales, sorted_scales)), sorted_scales, per_row=True)

    def sorted_inputs(self, rows: Tensor, projection: ExpertProjection) -> Rows:
        """Returns sorted rows [R, K] as the projection's weight takes them."""
        if projection.weight.dtype != FLOAT8:
            return Rows(rows)
        if projection.input_scale is None:
            values, scales = quantize_fp8_per_token(rows)
            return Rows(values, scales, per_row=True)
        return Rows(rows, projection.input_scale)

    def spread(
        self, rows: Tensor, *, by_expert: Tensor | None = None, moved: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Returns rows [A, K] or [A / top_k, K] at their assignments' places: [R, K].

        Args:
            rows: what to copy.
            by_expert: float32 [E]: rows become float8, divided by these.
            moved: one float32 per row, and where they go [R].
        """
        width = rows.shape[1]
        dtype = rows.dtype if by_expert is None else FLOAT8
        out = torch.empty((self.num_rows, width), dtype=dtype, device=rows.device)
        is_float8 = dtype == FLOAT8
        before, after = moved or (None, None)
        spread_kernel[(rows.shape[0], -(-width // COLUMNS))](
            float8_storage(rows) if rows.dtype == FLOAT8 else rows, before, by_expert,
            self.blocks.experts, self.blocks.places, float8_storage(out) if is_float8 else out, after,
            self.first, rows.stride(0),
            SHARE=self.blocks.experts.numel() // rows.shape[0], HELD=self.held, WIDTH=width, BLOCK=COLUMNS,
            NATIVE_FLOAT8=has_float8(), USE_PDL=use_pdl(), num_warps=4, **launch_options(),
        )  # fmt: skip
        return out

    def product(
        self, x: Rows, projection: ExpertProjection, gate: Swiglu | None = None, out_scale: Tensor | None = None
    ) -> Tensor:
        """Returns the result of each row [R, N], or [R, N / 2] of the gate; in float8 by ``out_scale`` [E]."""
        held, n, k = projection.weight.shape
        tile, scale = self.tile, projection.weight_scale
        weight, values = projection.weight, x.values
        if weight.dtype == FLOAT8:
            weight, values = float8_storage(weight), float8_storage(values)
        parts = 1 if gate is None else 2
        dtype = self.dtype if out_scale is None else FLOAT8
        out = torch.empty((self.num_rows, n // parts), dtype=dtype, device=values.device)
        stored = out if out_scale is None else float8_storage(out)
        block_k = tile.block_bytes // weight.element_size()
        programs = self.blocks.count * -(-n // tile.block_n)
        if tile.resident:
            programs = min(programs, tile.resident * _multiprocessors(values.device))
        weight = weight.view(held * parts, n // parts, k)
        boxes = (
            (values, [tile.block_m, block_k]),
            (weight, [parts, tile.block_n // parts, block_k]),
            (stored, [tile.block_m, tile.block_n // 2]),
        )
        sorted_product_kernel[(programs,)](
            *(TensorDescriptor.from_tensor(tensor, box) for tensor, box in boxes),
            projection.bias, x.scale, scale, out_scale, self.blocks.expert_of, self.blocks.used,
            N=n, K=k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=block_k, GROUP=tile.group,
            STAGES=tile.num_stages, FLATTEN=tile.flatten, DTYPE=_TRITON_DTYPES[self.dtype],
            SCALE_PER_ROW=x.per_row, SCALE_PER_COL=scale is not None and scale.dim() > 1,
            GATE=None if gate is None else (gate.alpha, gate.offset, gate.limit),
            NATIVE_FLOAT8=has_float8(), USE_PDL=use_pdl(),
            num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(),
        )  # fmt: skip
        return out

    def sums(self, parts: Tensor, weights: Tensor | None) -> Tensor:
        """Returns the weighted sum of each token's results [R, H]: [T, H]."""
        (tokens, top_k), width = self.blocks.experts.shape, parts.shape[1]
        out = torch.empty((tokens, width), dtype=parts.dtype, device=parts.device)
        block = min(COLUMNS, next_power_of_2(width))
        sum_kernel[(tokens, -(-width // block))](
            parts, self.blocks.experts, self.blocks.places, weights, out, self.first,
            HELD=self.held, TOP_K=top_k, WIDTH=width, BLOCK=block,
            USE_PDL=use_pdl(), num_warps=4, **launch_options(),
        )  # fmt: skip
        return out
