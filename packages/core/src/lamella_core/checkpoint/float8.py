"""Filling float8 parameters and their scales, from float8 weights or by quantizing wider ones as they are read.

A source tensor has one scale, or one per output feature. A parameter with one scale that is fused from several sources
gets the largest of theirs, and the others' values are rounded anew to it: exactly the same values where the scales are
equal. Scales are those of the whole tensors, so all ranks of a tensor-parallel group use the same.

Wider weights get the scale largest magnitude / 448, and are rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamella_core.checkpoint.planner import FLOAT8, Fill
from lamella_core.checkpoint.rules import kv_scale_names, scale_name
from lamella_core.checkpoint.source import WeightSource
from lamella_core.errors import CheckpointError
from lamella_core.kernels.fp8 import FLOAT8_MAX, LEAST_AMAX, widen
from lamella_core.layers.parameter import Parameter
from lamella_core.layers.sharding import HeadShard, ShardSpec

_BLOCK_NUMBERS = 1 << 22  # quantized, or searched for the largest, at a time


def quantized(
    weight: Parameter, scales: dict[str, Parameter], fills: Sequence[Fill], source: WeightSource
) -> dict[str, torch.Tensor]:
    """Returns the float8 data of ``weight`` and of the ``scales`` beside it, by leaf name.

    Args:
        weight: [out, in] or [experts, out, in].
        scales: "weight_scale" [], [out], [experts] or [experts, out]; "activation_scale" [] or [experts], if any.
        fills: what fills the weight.
        source: where from.

    Raises:
        CheckpointError: a scale has another shape than the configuration needs, or is no positive number.
    """
    rows = _row_spec(weight.shard)
    per_row = scales["weight_scale"].dim() == len(rows.dims)
    given = _row_scales(rows, fills, source, per_row=per_row)
    own = given if per_row else given.amax(dim=-1)
    spread = own.unsqueeze(-1) if per_row else own[..., None, None].expand(*given.shape, 1)
    out = torch.zeros(weight.shape, dtype=FLOAT8)
    for fill in fills:
        for piece in fill.pieces(weight.shard):
            at = piece.target[:-1]
            stored = source.dtype(fill.source) == FLOAT8
            target, old, new = out[piece.target], given[at].unsqueeze(-1), spread[at]
            if fill.expert is not None:
                target, old, new = target[0], old[0], new[0]
            if stored and torch.equal(old, new.expand_as(old)):
                source.copy(target, fill.source, piece.source, transpose=piece.transpose)
                continue
            wide = torch.empty(target.shape, dtype=source.dtype(fill.source))
            source.copy(wide, fill.source, piece.source, transpose=piece.transpose)
            _round_into(target, wide, (new / old).nan_to_num_(1.0) if stored else new)
    data = {"weight": out, "weight_scale": own.contiguous()}
    if "activation_scale" in scales:
        data["activation_scale"] = _input_scales(rows, fills, source)
    return data


def dequantized(parameter: Parameter, fills: Sequence[Fill], source: WeightSource) -> torch.Tensor:
    """Returns the data of a parameter in its own dtype, from float8 tensors times their scales."""
    if isinstance(parameter.shard, HeadShard):
        return _dequantized_heads(parameter, fills, source)
    rows = _row_spec(parameter.shard)
    factors = _row_scales(rows, fills, source, per_row=True)
    out = torch.zeros(parameter.shape, dtype=parameter.dtype)
    for fill in fills:
        for piece in fill.pieces(parameter.shard):
            target, factor = out[piece.target], factors[piece.target[:-1]].unsqueeze(-1)
            if fill.expert is not None:
                target, factor = target[0], factor[0]
            wide = torch.empty(target.shape, dtype=torch.float32)
            source.copy(wide, fill.source, piece.source, transpose=piece.transpose)
            target.copy_(wide.mul_(factor))
    return out


def _dequantized_heads(parameter: Parameter, fills: Sequence[Fill], source: WeightSource) -> torch.Tensor:
    """Returns what `dequantized` does for a stack of heads, of which each has some rows of the source."""
    out = torch.zeros(parameter.shape, dtype=parameter.dtype)
    for fill in fills:
        rows = source.shape(fill.source)[:1]
        scales = _stored_scales(scale_name(fill.source, "weight_scale"), rows, source, per_row=True)
        for piece in fill.pieces(parameter.shard):
            part = source.read(fill.source, piece.source).float().mul_(scales[piece.source[0]].unsqueeze(-1))
            piece.of(out).copy_(part.mT if piece.transpose else part)
    return out


def kv_scales(fills: Sequence[Fill], source: WeightSource) -> torch.Tensor:
    """Returns the scales [2] float32 of keys and values in a float8 cache; 1 where the checkpoint has none."""
    names, scales = set(source.names()), torch.ones(2)
    for index, key in enumerate("kv"):
        makers = [f for f in fills if f.rule.section is None or key in f.rule.section]
        found = [name for fill in makers for name in kv_scale_names(fill.source, key) if name in names]
        if found:
            scales[index] = _numbers(found[0], source, least=0.0).amax()
    return scales


def _row_spec(spec: ShardSpec) -> ShardSpec:
    """Returns the spec of one number per row of a weight."""
    return ShardSpec(dims=spec.dims[:-1], stacked_experts=spec.stacked_experts)


def _row_scales(rows: ShardSpec, fills: Sequence[Fill], source: WeightSource, *, per_row: bool) -> torch.Tensor:
    """Returns the scale of the source of each row of a weight: [out] or [experts, out] float32.

    ``per_row`` says whether rows of one source may differ.
    """
    out = torch.zeros(rows.shape, dtype=torch.float32)
    for fill in fills:
        shape = rows.source_shape(fill.rule.section, expert=fill.expert)
        if source.dtype(fill.source) == FLOAT8:
            scales = _stored_scales(scale_name(fill.source, "weight_scale"), shape, source, per_row=per_row)
        else:
            scales = _largest(fill, shape, source, per_row=per_row).clamp_min_(LEAST_AMAX) / FLOAT8_MAX
        for piece in rows.pieces(fill.rule.section, expert=fill.expert, interleaved=fill.rule.interleaved):
            target = out[piece.target]
            (target[0] if fill.expert is not None else target).copy_(scales[piece.source])
    return out


def _stored_scales(name: str, rows: tuple[int, ...], source: WeightSource, *, per_row: bool) -> torch.Tensor:
    """Returns a source's scales, one per row: ``rows`` is (out,) or (experts, out)."""
    scales = _numbers(name, source, least=0.0)
    if scales.numel() == 1:
        return scales.view(()).expand(rows)
    if len(rows) > 1 and scales.numel() == rows[0]:
        return scales.view(-1, 1).expand(rows)
    if per_row and scales.numel() == torch.Size(rows).numel():
        return scales.reshape(rows)
    need = f"[] or {[*rows]}" if per_row else f"[] or {[*rows[:-1]]}"
    raise CheckpointError(
        f"{source.path(name)}: {name} has shape {list(scales.shape)}, the configuration needs {need}; check that its "
        "quant_algo is that of the weights"
    )


def _largest(fill: Fill, rows: tuple[int, ...], source: WeightSource, *, per_row: bool) -> torch.Tensor:
    """Returns the largest magnitude in each row of a source, of its whole tensor or of its expert: ``rows``."""
    shape = source.shape(fill.source)
    step = max(1, _BLOCK_NUMBERS // max(1, torch.Size(shape[1:]).numel()))
    inner, found = (-2 if fill.rule.transpose else -1), []
    for begin in range(0, shape[0], step):
        block = source.read(fill.source, (slice(begin, begin + step),)).abs_()
        if fill.rule.transpose and len(shape) == 2:  # a matrix: its first dimension is the inner one
            found.append(block.amax(dim=0, keepdim=True))
        else:
            found.append(block.amax(dim=inner))
    largest = torch.cat(found).float()
    if fill.rule.transpose and len(shape) == 2:
        largest = largest.amax(dim=0)
    return largest if per_row else largest.amax(dim=-1, keepdim=True).expand(rows).contiguous()


def _input_scales(rows: ShardSpec, fills: Sequence[Fill], source: WeightSource) -> torch.Tensor:
    """Returns the largest of the sources' input scales: [], or one for each expert of the rank."""
    if not rows.stacked_experts:
        return torch.stack([_numbers(scale_name(f.source, "input_scale"), source).amax() for f in fills]).amax()
    experts = rows.dims[0][0]
    out = torch.zeros(experts.length)
    for fill in fills:
        scales = _numbers(scale_name(fill.source, "input_scale"), source).reshape(-1)
        if fill.expert is not None:
            here = slice(fill.expert - experts.start, fill.expert - experts.start + 1)
        else:
            here = slice(None)
            scales = scales[experts.start : experts.start + experts.length] if scales.numel() > 1 else scales
        out[here] = torch.maximum(out[here], scales.amax() if fill.expert is not None else scales)
    return out


def _numbers(name: str, source: WeightSource, least: float | None = None) -> torch.Tensor:
    """Returns a tensor of scales in float32.

    Raises:
        CheckpointError: not all are finite and positive (at least ``least`` where that is given).
    """
    scales = source.read(name).float()
    good = scales.isfinite() & ((scales > 0.0) if least is None else (scales >= least))
    if scales.numel() == 0 or not bool(good.all()):
        raise CheckpointError(f"{source.path(name)}: {name} holds a scale that is not a positive number; copy it again")
    return scales


def _round_into(target: torch.Tensor, wide: torch.Tensor, divisor: torch.Tensor) -> None:
    """Fills target [..., rows, in] float8 with ``wide`` by ``divisor`` [..., rows, 1], some rows at a time."""
    if wide.dim() > 2:
        for one, values, divisors in zip(target, wide, divisor, strict=True):
            _round_into(one, values, divisors)
        return
    step = max(1, _BLOCK_NUMBERS // max(1, wide.shape[1]))
    for begin in range(0, wide.shape[0], step):
        block = slice(begin, begin + step)
        values = widen(wide[block]) if wide.dtype == FLOAT8 else wide[block].float()
        scaled = values / divisor[block]
        target[block] = scaled.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
