"""What fills each parameter of a model: its `WeightRule` table, matched with the tensors that a source holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lamella_core.checkpoint.rules import (
    KV_SCALES,
    SCALE_LEAVES,
    WeightRule,
    is_ignored,
    is_runtime_scale,
    kv_scale_names,
    scale_name,
    weight_of_scale,
)
from lamella_core.checkpoint.source import WeightSource
from lamella_core.errors import CheckpointError
from lamella_core.layers.parameter import Parameter
from lamella_core.layers.sharding import Piece, ShardSpec

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

FLOAT8 = torch.float8_e4m3fn
_HINTS = {
    "weight_scale": "Float8 weights mean nothing without their weight_scale: copy the whole directory again",
    "input_scale": (
        "Static activation scales (input_scale) come from calibration: use a checkpoint that has them, or set "
        "QuantConfig.activation_scheme to 'dynamic'"
    ),
}


@dataclass(frozen=True)
class Fill:
    """One source tensor that (partly) fills a parameter."""

    source: str  # tensor name
    rule: WeightRule
    expert: int | None  # global index when the source is one expert's tensor of a stacked parameter

    def pieces(self, spec: ShardSpec) -> tuple[Piece, ...]:
        """Returns the copies into a parameter of this spec."""
        rule = self.rule
        return spec.pieces(rule.section, expert=self.expert, transpose=rule.transpose, interleaved=rule.interleaved)

    def source_shape(self, spec: ShardSpec) -> tuple[int, ...]:
        """Returns the shape that the source must have."""
        return spec.source_shape(self.rule.section, expert=self.expert, transpose=self.rule.transpose)


@dataclass
class Report:
    """What does not fit, by name."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def raise_if_any(self, directory: Path, model_name: str) -> None:
        """Raises one `CheckpointError` that names everything, if there is anything."""
        parts = [
            f"{len(set(names))} {title}:\n  " + "\n  ".join(sorted(set(names)))
            for title, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of wrong shape or dtype", self.wrong),
            )
            if names
        ]
        if parts:
            parts += [hint for leaf, hint in _HINTS.items() if any(name.endswith(leaf) for name in self.missing)]
            raise CheckpointError(
                f"{directory} does not fit {model_name}; check that config.json and the weights belong together. "
                "Tensors " + "\n".join(parts)
            )


class Planner:
    """Compares a model's parameters with a source's tensors by name, shape and dtype."""

    def __init__(self, model: CausalLM, source: WeightSource) -> None:
        self._model = model
        self._source = source
        self._is_quantized = model.config.quantization.is_quantized
        self._names = set(source.names())
        self._rules: list[WeightRule] = model.weight_rules(self._names)
        self._known: set[str] = set()  # source tensors that the parameters of this rank account for
        self._report = Report()

    def plan(self, parameters: dict[str, Parameter]) -> dict[str, list[Fill]]:
        """Returns what fills each parameter; a scale parameter has the fills of the weight that it belongs to.

        Raises:
            CheckpointError: see `load_weights`.
        """
        plan = {}
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            if leaf == KV_SCALES:
                plan[name] = self._kv_fills(f"{path}.qkv_proj.weight", parameters)
            elif leaf in SCALE_LEAVES:
                plan[name] = self._fills(f"{path}.weight", parameters[f"{path}.weight"].shard, SCALE_LEAVES[leaf])
            else:
                plan[name] = self._fills(name, parameter.shard)
                self._check(name, plan[name], parameter)
        self._find_unexpected()
        self._report.raise_if_any(self._source.directory, type(self._model).__name__)
        return plan

    def _fills(self, name: str, spec: ShardSpec, scale: str | None = None) -> list[Fill]:
        """Returns what fills the parameter ``name``; with ``scale``, the leaf that is needed beside each source."""
        by_section: dict[object, list[list[Fill]]] = {}
        for rule in self._rules:
            indices = rule.match_target(name)
            if indices is not None:
                by_section.setdefault(rule.section, []).append(self._sources(rule, indices, spec))
        if not by_section:
            raise CheckpointError(f"{type(self._model).__name__}.WEIGHTS has no rule for the parameter {name!r}")
        fills = list(self._chosen(by_section))
        if scale is not None:
            self._check_scales(fills, scale)
            return fills
        self._report.missing += [f.source for f in fills if f.source not in self._names and not f.rule.optional]
        return [fill for fill in fills if fill.source in self._names]

    def _chosen(self, by_section: dict[object, list[list[Fill]]]) -> Iterator[Fill]:
        """Yields the fills of the spelling that the source uses, for the whole parameter or for each section."""
        whole = by_section.pop(None, [])
        present = [fills for fills in whole if self._any_present(fills)]
        if present or not by_section:
            yield from (present or whole)[0]
            return
        for alternatives in by_section.values():
            yield from next(filter(self._any_present, alternatives), alternatives[0])

    def _sources(self, rule: WeightRule, indices: tuple[int | None, int | None], spec: ShardSpec) -> list[Fill]:
        layer, expert = indices
        if not rule.stacks_experts:
            self._known.add(rule.source_name(layer, expert))
            return [Fill(rule.source_name(layer, expert), rule, None)]
        experts = spec.dims[0][0]
        self._known.update(rule.source_name(layer, e) for e in range(experts.size))
        held = range(experts.start, experts.start + experts.length)
        return [Fill(rule.source_name(layer, e), rule, e) for e in held]

    def _any_present(self, fills: list[Fill]) -> bool:
        return any(fill.source in self._names for fill in fills)

    def _kv_fills(self, name: str, parameters: dict[str, Parameter]) -> list[Fill]:
        """Returns the sources of the key and value projections, beside which the scales of keys and values may be."""
        fills = self._fills(name, parameters[name].shard)
        for fill in fills:
            self._known.update(kv_scale_names(fill.source, "k") + kv_scale_names(fill.source, "v"))
        return fills

    def _check(self, name: str, fills: list[Fill], parameter: Parameter) -> None:
        for fill in fills:
            need, shape = fill.source_shape(parameter.shard), self._source.shape(fill.source)
            if shape != need:
                self._wrong(fill.source, f"shape {list(shape)}, the configuration needs {list(need)}")
            self._check_dtype(fill.source, parameter.dtype)
        if len({self._source.dtype(fill.source) == FLOAT8 for fill in fills}) == 2:
            self._wrong(", ".join(fill.source for fill in fills), f"some parts of {name} are float8 and others are not")

    def _check_dtype(self, source: str, wanted: torch.dtype) -> None:
        dtype = self._source.dtype(source)
        if wanted.is_floating_point and not (dtype.is_floating_point and dtype.itemsize > 1):
            readable = dtype == FLOAT8 and (wanted == FLOAT8 or self._is_quantized)
            if not readable:
                hint = "" if dtype != FLOAT8 else " (nothing says that the weights are quantized: is a file missing?)"
                self._wrong(source, f"dtype {dtype}, the configuration needs {wanted}{hint}")
            elif scale_name(source, "weight_scale") not in self._names:
                self._report.missing.append(scale_name(source, "weight_scale"))

    def _check_scales(self, fills: list[Fill], leaf: str) -> None:
        """Checks that the scales beside the sources are there; weights that are not float8 yet need no weight_scale."""
        for fill in fills:
            if fill.source not in self._names or (leaf == "weight_scale" and self._source.dtype(fill.source) != FLOAT8):
                continue
            name = scale_name(fill.source, leaf)
            if name not in self._names:
                self._report.missing.append(name)
            elif not (self._source.dtype(name).is_floating_point and self._source.dtype(name).itemsize > 1):
                self._wrong(name, f"dtype {self._source.dtype(name)}, scales are float32")

    def _wrong(self, source: str, what: str) -> None:
        self._report.wrong.append(f"{source}: {what}")

    def _find_unexpected(self) -> None:
        for name in self._names - self._known:
            weight = weight_of_scale(name) if self._is_quantized else None
            known = weight in self._known or (weight is not None and self._of_other_rank_or_tied(weight))
            scale = self._is_quantized and is_runtime_scale(name)
            ignored = is_ignored(name, self._model.ignored_sources())
            if not (known or scale or ignored or self._of_other_rank_or_tied(name)):
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
