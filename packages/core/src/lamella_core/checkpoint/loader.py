"""Fills a model's parameters from a Hugging Face directory, by the model's table of `WeightRule`.

First everything is compared by name, shape and dtype, and every disagreement is reported in one error; only then are
bytes read, one parameter at a time and only the part that the rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lamella_core.checkpoint.rules import WeightRule, is_ignored
from lamella_core.checkpoint.source import WeightSource
from lamella_core.errors import CheckpointError
from lamella_core.layers.parameter import Parameter, set_parameter
from lamella_core.layers.sharding import Piece, ShardSpec

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class _Fill:
    """One source tensor that (partly) fills a parameter."""

    source: str  # tensor name
    rule: WeightRule
    expert: int | None  # global index when the source is one expert's tensor of a stacked parameter


@dataclass
class _Report:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def raise_if_any(self, directory: Path, model_name: str) -> None:
        parts = [
            f"{len(names)} {title}:\n  " + "\n  ".join(sorted(names))
            for title, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of wrong shape or dtype", self.wrong),
            )
            if names
        ]
        if parts:
            raise CheckpointError(
                f"{directory} does not fit {model_name}; check that config.json and the weights belong together. "
                "Tensors " + "\n".join(parts)
            )


def load_weights(model: CausalLM, source: WeightSource | Path | str, *, progress: Progress | None = None) -> None:
    """Fills every parameter of ``model`` (made by ``Model.empty``) from ``source``, cast to the parameter's dtype.

    Args:
        model: gives ``weight_rules``, ``IGNORED`` and parameters that carry ``shard``.
        source: a Hugging Face directory.
        progress: called after each parameter with the bytes filled and the bytes of all parameters on this rank.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are missing, unexpected or of the wrong shape; the
            message names all of them. The model is untouched then.
    """
    source = source if isinstance(source, WeightSource) else WeightSource(source)
    parameters: dict[str, Parameter] = dict(model.named_parameters())  # type: ignore[arg-type]
    plan = _Planner(model, source).plan(parameters)
    total, done = sum(p.nbytes for p in parameters.values()), 0
    for name, fills in plan.items():
        data = _filled(parameters.pop(name), fills, source)
        set_parameter(model, name, data)
        done += data.nbytes
        if progress is not None:
            progress(done, total)
    source.close()


def _filled(parameter: Parameter, fills: Iterable[_Fill], source: WeightSource) -> torch.Tensor:
    copies = [(fill, piece) for fill in fills for piece in _pieces(parameter.shard, fill)]
    covered = sum(_numel(piece.target, parameter.shape) for _, piece in copies)
    make = torch.empty if covered == parameter.numel() else torch.zeros  # padding and absent optional parts are zero
    out = make(parameter.shape, dtype=parameter.dtype)
    for fill, piece in copies:
        target = out[piece.target]
        target = target[0] if fill.expert is not None else target
        source.copy(target, fill.source, piece.source, transpose=piece.transpose)
    return out


def _pieces(spec: ShardSpec, fill: _Fill) -> tuple[Piece, ...]:
    return spec.pieces(fill.rule.section, expert=fill.expert, transpose=fill.rule.transpose)


def _numel(slices: tuple[slice, ...], shape: torch.Size) -> int:
    count = 1
    for dim, size in enumerate(shape):
        begin, end, _ = slices[dim].indices(size) if dim < len(slices) else (0, size, 1)
        count *= max(0, end - begin)
    return count


class _Planner:
    """Compares a model's parameters with a source's tensors by name, shape and dtype."""

    def __init__(self, model: CausalLM, source: WeightSource) -> None:
        self._model = model
        self._source = source
        self._names = set(source.names())
        self._rules: list[WeightRule] = model.weight_rules(self._names)
        self._known: set[str] = set()  # source tensors that the parameters of this rank account for
        self._report = _Report()

    def plan(self, parameters: dict[str, Parameter]) -> dict[str, list[_Fill]]:
        """Returns what fills each parameter.

        Raises:
            CheckpointError: see `load_weights`.
        """
        plan = {name: self._fills(name, parameter.shard) for name, parameter in parameters.items()}
        for name, fills in plan.items():
            for fill in fills:
                self._check(fill, parameters[name])
        self._find_unexpected()
        self._report.raise_if_any(self._source.directory, type(self._model).__name__)
        return plan

    def _fills(self, name: str, spec: ShardSpec) -> list[_Fill]:
        by_section: dict[object, list[list[_Fill]]] = {}
        for rule in self._rules:
            indices = rule.match_target(name)
            if indices is not None:
                by_section.setdefault(rule.section, []).append(self._sources(rule, indices, spec))
        if not by_section:
            raise CheckpointError(f"{type(self._model).__name__}.WEIGHTS has no rule for the parameter {name!r}")
        whole = by_section.pop(None, [])
        present = [fills for fills in whole if self._any_present(fills)]
        if present or not by_section:
            return self._keep_present((present or whole)[0])
        kept: list[_Fill] = []
        for alternatives in by_section.values():
            kept += self._keep_present(next(filter(self._any_present, alternatives), alternatives[0]))
        return kept

    def _sources(self, rule: WeightRule, indices: tuple[int | None, int | None], spec: ShardSpec) -> list[_Fill]:
        layer, expert = indices
        if not rule.stacks_experts:
            self._known.add(rule.source_name(layer, expert))
            return [_Fill(rule.source_name(layer, expert), rule, None)]
        experts = spec.dims[0][0]
        self._known.update(rule.source_name(layer, e) for e in range(experts.size))
        held = range(experts.start, experts.start + experts.length)
        return [_Fill(rule.source_name(layer, e), rule, e) for e in held]

    def _any_present(self, fills: list[_Fill]) -> bool:
        return any(fill.source in self._names for fill in fills)

    def _keep_present(self, fills: list[_Fill]) -> list[_Fill]:
        kept = []
        for fill in fills:
            if fill.source in self._names:
                kept.append(fill)
            elif not fill.rule.optional:
                self._report.missing.append(fill.source)
        return kept

    def _check(self, fill: _Fill, parameter: Parameter) -> None:
        need = parameter.shard.source_shape(fill.rule.section, expert=fill.expert, transpose=fill.rule.transpose)
        shape, dtype = self._source.shape(fill.source), self._source.dtype(fill.source)
        if shape != need:
            self._report.wrong.append(f"{fill.source}: shape {list(shape)}, the configuration needs {list(need)}")
        plain = dtype.is_floating_point and dtype.itemsize > 1
        if parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1 and not plain:
            self._report.wrong.append(f"{fill.source}: dtype {dtype}, the configuration needs {parameter.dtype}")

    def _find_unexpected(self) -> None:
        for name in self._names - self._known:
            if not self._of_other_rank_or_tied(name) and not is_ignored(name, self._model.IGNORED):
                self._report.unexpected.append(name)

    def _of_other_rank_or_tied(self, source: str) -> bool:
        """Whether a rule reads ``source`` for a parameter that this rank's model does not hold itself."""
        config = self._model.config
        here = config.mapping.pp_layers(config.num_hidden_layers)
        for rule in self._rules:
            indices = rule.match_source(source)
            if indices is not None:
                layer = indices[0]
                return layer is None or (layer < config.num_hidden_layers and layer not in here)
        return False
