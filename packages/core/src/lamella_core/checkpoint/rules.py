"""WeightRule: one line of a model's table that says which source tensor fills which parameter.

A model file lists its rules as data; `lamella_core.checkpoint.loader` reads them. Example, a fused query/key/value
parameter filled from three source tensors per layer, and one from a Conv1D that stores ``[in, out]``::

    WEIGHTS = [
        WeightRule("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.qkv.weight", section="q"),
        WeightRule("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attention.qkv.weight", section="k"),
        WeightRule("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attention.qkv.weight", section="v"),
        WeightRule("transformer.h.{i}.attn.c_proj.weight", "layers.{i}.attention.out.weight", transpose=True),
    ]
    IGNORED = ["*.rotary_emb.inv_freq"]
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

SCALE_LEAVES = {"weight_scale": "weight_scale", "activation_scale": "input_scale"}  # parameter -> beside the weight
KV_SCALES = "kv_scales"
_RUNTIME_SCALES = ("*.k_scale", "*.v_scale", "*.q_scale", "*.prob_scale", "*.output_scale", "*.prob_output_scale")
_WEIGHT = ".weight"

_PLACEHOLDER = re.compile(r"\{([ie])\}")


@dataclass(frozen=True)
class WeightRule:
    """How a source tensor becomes (a part of) a parameter.

    Attributes:
        source: tensor name in the source, with ``{i}`` for the layer and ``{e}`` for the expert, both counted over the
            whole model (a pipeline stage or an expert rank keeps the global numbers).
        target: parameter name in the model, with the same placeholders. A target without ``{e}`` under a source with
            ``{e}`` is a stacked parameter ``[experts on this rank, ...]``: the source fills one slot of it.
        section: the section of a fused parameter that the source fills (a name of its `ShardSpec`), or several names
            when the source is itself fused in that order; None: the source covers the whole parameter, in its order.
        transpose: the source is stored ``[in, out]``; the parameter is ``[out, in]``.
        interleaved: the sections are stored head group by head group: the queries of a key/value head, its key and its
            value, then the next one's.
        optional: the source may be missing; what it would have filled is then zero (a bias, for example). A tied output
            layer needs no such mark: its parameter is the embedding's, and its source is then left unread.

    Several rules may name the same target and section: the first whose source exists counts (checkpoints of the same
    model written in different formats).
    """

    source: str
    target: str
    section: str | tuple[str, ...] | None = None
    transpose: bool = False
    interleaved: bool = False
    optional: bool = False

    def source_name(self, index: int | None = None, expert: int | None = None) -> str:
        """Returns the source tensor's name for a layer and an expert."""
        return _fill(self.source, index, expert)

    def match_target(self, name: str) -> tuple[int | None, int | None] | None:
        """Returns ``(layer, expert)`` when the rule fills the parameter ``name`` (None where it has no placeholder)."""
        return _match(self.target, name)

    def match_source(self, name: str) -> tuple[int | None, int | None] | None:
        """Returns ``(layer, expert)`` when ``name`` is a source tensor of this rule."""
        return _match(self.source, name)

    @property
    def stacks_experts(self) -> bool:
        """Whether the sources of all experts of the rank go into one parameter."""
        return "{e}" in self.source and "{e}" not in self.target


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether a source tensor may be left unread: ``name`` matches one of the shell-style ``patterns``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def scale_name(weight: str, leaf: str) -> str:
    """Returns where a checkpoint keeps the "weight_scale" or "input_scale" of a source tensor ``weight``."""
    return f"{weight.removesuffix(_WEIGHT)}.{leaf}" if weight.endswith(_WEIGHT) else f"{weight}_{leaf}"


def weight_of_scale(name: str) -> str | None:
    """Returns the weight that a scale belongs to, inverse of `scale_name`; None if ``name`` is no scale."""
    for leaf in SCALE_LEAVES.values():
        if name.endswith(f".{leaf}"):
            return name.removesuffix(leaf) + "weight"
        if name.endswith(f"_{leaf}"):
            return name.removesuffix(f"_{leaf}")
    return None


def kv_scale_names(projection: str, key: str) -> list[str]:
    """Returns where a checkpoint may keep the scale of keys (``key`` "k") or values ("v") in the cache.

    ``projection`` is the weight of the projection that makes them.
    """
    module = projection.removesuffix(_WEIGHT)
    return [f"{owner}.{key}_scale" for owner in (module, module.rpartition(".")[0])]


def is_runtime_scale(name: str) -> bool:
    """Whether a tensor is the scale of a value that only exists while the model runs."""
    return is_ignored(name, _RUNTIME_SCALES)


def _fill(pattern: str, index: int | None, expert: int | None) -> str:
    return pattern.replace("{i}", str(index)).replace("{e}", str(expert))


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(pattern)  # literal, placeholder, literal, ...
    regex = "".join(rf"(?P<{part}>\d+)" if k % 2 else re.escape(part) for k, part in enumerate(parts))
    return re.compile(regex, re.ASCII)


def _match(pattern: str, name: str) -> tuple[int | None, int | None] | None:
    found = _compiled(pattern).fullmatch(name)
    if found is None:
        return None
    groups = found.groupdict()
    return tuple(int(groups[key]) if key in groups else None for key in ("i", "e"))  # type: ignore[return-value]
