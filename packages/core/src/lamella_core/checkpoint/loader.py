"""Fills a model's parameters from a Hugging Face directory, by the model's table of `WeightRule`.

First everything is compared by name, shape and dtype, and every disagreement is reported in one error; only then are
bytes read, one parameter at a time and only the part that the rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lamella_core.checkpoint import float8
from lamella_core.checkpoint.block_scales import open_source
from lamella_core.checkpoint.planner import Fill, Planner
from lamella_core.checkpoint.rules import KV_SCALES, SCALE_LEAVES
from lamella_core.checkpoint.source import WeightSource
from lamella_core.layers.parameter import Parameter, set_parameter

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def load_weights(
    model: CausalLM, source: WeightSource | Path | str, *, progress: Progress | None = None, device: str = "cpu"
) -> None:
    """Fills every parameter of ``model`` (made by ``Model.empty``) from ``source``, cast to the parameter's dtype.

    Float8 parameters are filled from float8 weights and their scales, or quantized as they are read; float8 weights of
    a quantized checkpoint that the model holds in its own dtype are scaled back. See `lamella_core.checkpoint.float8`,
    and `lamella_core.checkpoint.block_scales` for weights with scales per block.

    Args:
        model: gives ``weight_rules``, ``ignored_sources`` and parameters that carry ``shard``.
        source: a Hugging Face directory.
        progress: called after each parameter with the bytes filled and the bytes of all parameters on this rank.
        device: where the parameters go. Pieces of a mapped file are copied straight to a GPU; the host holds at most
            one parameter.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are missing, unexpected or of the wrong shape; the
            message names all of them, and the model is untouched then. A scale that is no positive number is noticed
            when it is read.
    """
    source = source if isinstance(source, WeightSource) else open_source(source)
    parameters: dict[str, Parameter] = dict(model.named_parameters())  # type: ignore[arg-type]
    plan = Planner(model, source).plan(parameters)
    total, done = sum(p.nbytes for p in parameters.values()), 0
    for name in list(plan):
        for key, data in _filled(name, parameters, plan, source, device).items():
            set_parameter(model, key, data.to(device))
            done += data.nbytes
            del parameters[key]
        if progress is not None:
            progress(done, total)
    source.close()
    model.finish_loading()


def _filled(
    name: str, parameters: dict[str, Parameter], plan: dict[str, list[Fill]], source: WeightSource, device: str
) -> dict[str, torch.Tensor]:
    """Returns the data of a parameter, and of those that are filled with it, by name; nothing if that was done."""
    path, _, leaf = name.rpartition(".")
    if leaf in SCALE_LEAVES:
        return {}  # with their weight
    parameter, fills = parameters[name], plan[name]
    if leaf == KV_SCALES:
        return {name: float8.kv_scales(fills, source)}
    if parameter.dtype == float8.FLOAT8:
        scales = {key: parameters[f"{path}.{key}"] for key in SCALE_LEAVES if f"{path}.{key}" in parameters}
        data = float8.quantized(parameter, scales, fills, source)
        return {f"{path}.{key}": tensor for key, tensor in data.items()}
    if any(source.dtype(fill.source) == float8.FLOAT8 for fill in fills):
        return {name: float8.dequantized(parameter, fills, source)}
    return {name: _copied(parameter, fills, source, device)}


def _copied(parameter: Parameter, fills: Iterable[Fill], source: WeightSource, device: str) -> torch.Tensor:
    copies = [(fill, piece) for fill in fills for piece in fill.pieces(parameter.shard)]
    covered = sum(_numel(piece.target, parameter.shape) for _, piece in copies)
    make = torch.empty if covered == parameter.numel() else torch.zeros  # padding and absent optional parts are zero
    out = make(parameter.shape, dtype=parameter.dtype, device=device)
    for fill, piece in copies:
        source.copy(piece.of(out), fill.source, piece.source, transpose=piece.transpose)
    return out


def _numel(slices: tuple[slice, ...], shape: torch.Size) -> int:
    count = 1
    for dim, size in enumerate(shape):
        begin, end, _ = slices[dim].indices(size) if dim < len(slices) else (0, size, 1)
        count *= max(0, end - begin)
    return count
