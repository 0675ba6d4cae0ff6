"""ShardSpec: which part of a checkpoint's tensors one rank's parameter is made of, as data.

A parameter's dimension is a row of sections, each cut from its own source tensor (q, k and v of a fused projection) or
a single unnamed one. Every section says which elements of the source this rank reads and where they go, so fused
weights, key/value heads replicated over ranks, padded vocabularies, stacked experts and transposed sources all come
down to the same slices. The specs describe the plain (row-major) layout, before a kernel's own layout is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lamella_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Section:
    """One source tensor's share of one dimension of a parameter. All numbers count elements of that dimension."""

    size: int  # of the whole source
    start: int  # first source element that this rank holds
    length: int  # source elements that this rank holds
    padded_length: int  # elements that the section occupies in the parameter; those past ``length`` are zero
    offset: int = 0  # where the section begins in the parameter
    name: str | None = None
    group: int = 0  # elements of one head group, by which sources may interleave the sections; 0: they cannot


@dataclass(frozen=True)
class Piece:
    """One copy from a source tensor into a parameter.

    ``source`` indexes the tensor as stored; when ``transpose`` is set, the last two dimensions of the part read are
    swapped before it is written. ``target`` indexes the parameter; the number of elements is the same on both sides
    (one expert's part lacks the target's leading 1: copying broadcasts it).
    """

    source: Slices
    target: Slices
    transpose: bool = False

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the part of a parameter that is written, with as many dimensions as the source has."""
        part = parameter[self.target]
        return part[0] if part.dim() > len(self.source) else part


@dataclass(frozen=True)
class ShardSpec:
    """How one rank's parameter is cut from full tensors.

    ``dims`` holds the sections of each dimension in order. With ``stacked_experts`` dimension 0 counts experts and
    sources may be one expert's tensor (without that dimension) or the tensor of all experts.
    """

    dims: tuple[tuple[Section, ...], ...]
    stacked_experts: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter on this rank."""
        return tuple(sum(section.padded_length for section in sections) for sections in self.dims)

    @property
    def section_names(self) -> tuple[str, ...]:
        """Names of the fused sections in parameter order; empty when nothing is fused."""
        return tuple(s.name for sections in self.dims for s in sections if s.name is not None)

    def source_shape(
        self, section: str | Sequence[str] | None = None, *, expert: int | None = None, transpose: bool = False
    ) -> tuple[int, ...]:
        """Returns the shape that a source tensor must have.

        Args:
            section: name of the section that the source fills, several names when the source is itself fused in that
                order, None when it covers the whole parameter.
            expert: global index when the source is a single expert's tensor.
            transpose: the source is stored transposed, e.g. ``[in, out]`` for a weight ``[out, in]``.
        """
        dims = self._selected(section)[1:] if expert is not None else self._selected(section)
        shape = tuple(sum(s.size for s in sections) for sections in dims)
        return (*shape[:-2], shape[-1], shape[-2]) if transpose else shape

    def pieces(
        self,
        section: str | Sequence[str] | None = None,
        *,
        expert: int | None = None,
        transpose: bool = False,
        interleaved: bool = False,
    ) -> tuple[Piece, ...]:
        """Returns the copies that bring this rank's part of one source tensor into the parameter.

        Arguments are those of `source_shape`; with ``interleaved`` the source holds each head group's part of all the
        sections, then the next group's. Empty when this rank holds nothing of the source (another rank's expert, rows
        beyond the end of a padded vocabulary).

        Raises:
            ConfigError: an unknown section, or an expert given for a parameter that stacks none.
        """
        if expert is not None and not self.stacked_experts:
            raise ConfigError(f"expert {expert} given for a parameter of shape {self.shape} that stacks no experts")
        dims = self._selected(section)
        sources: list[Slices] = [()]
        targets: list[Slices] = [()]
        for index, sections in enumerate(dims):
            if index == 0 and expert is not None:
                cuts = _expert_cut(sections[0], expert)
            elif interleaved and all(s.group for s in sections):
                cuts = _interleaved_cuts(sections)
            else:
                cuts = _cuts(sections)
            sources = [done + ((cut[0],) if cut[0] else ()) for done in sources for cut in cuts]
            targets = [done + (cut[1],) for done in targets for cut in cuts]
        if transpose:
            sources = [(*s[:-2], s[-1], s[-2]) for s in sources]
        return tuple(Piece(s, t, transpose) for s, t in zip(sources, targets, strict=True))

    def _selected(self, section: str | Sequence[str] | None) -> tuple[tuple[Section, ...], ...]:
        """Returns ``dims`` with the fused dimension narrowed to the named sections, in the order named."""
        if section is None:
            return self.dims
        names = (section,) if isinstance(section, str) else tuple(section)
        for index, sections in enumerate(self.dims):
            by_name = {s.name: s for s in sections}
            if all(name in by_name for name in names):
                return (*self.dims[:index], tuple(by_name[name] for name in names), *self.dims[index + 1 :])
        raise ConfigError(f"no section {section!r} in this parameter; it has {self.section_names or 'none'}")


@dataclass(frozen=True)
class HeadShard(ShardSpec):
    """How a stack of matrices [heads, out, in] is cut from one source that holds head after head, among other rows.

    ``dims`` are one section each, of which the first counts heads. A head's rows in the source are its matrix (its
    transpose where the rule says so) and others' rows.
    """

    rows: int = 0  # of one head in the source
    first: int = 0  # of a head's rows, the first that belongs to the matrix

    def source_shape(
        self, section: str | Sequence[str] | None = None, *, expert: int | None = None, transpose: bool = False
    ) -> tuple[int, ...]:
        (heads,), (out,), (inner,) = self.dims
        return (heads.size * self.rows, out.size if transpose else inner.size)

    def pieces(
        self,
        section: str | Sequence[str] | None = None,
        *,
        expert: int | None = None,
        transpose: bool = False,
        interleaved: bool = False,
    ) -> tuple[Piece, ...]:
        (heads,), (out,), (inner,) = self.dims
        count, columns = (inner.size, out.size) if transpose else (out.size, inner.size)
        starts = [(heads.start + head) * self.rows + self.first for head in range(heads.length)]
        return tuple(
            Piece((slice(start, start + count), slice(0, columns)), (slice(head, head + 1),), transpose)
            for head, start in enumerate(starts)
        )


def _cuts(sections: Sequence[Section]) -> list[tuple[slice | None, slice]]:
    """Returns (source slice, target slice) of every section that has something to read, the sources end to end."""
    found: list[tuple[slice | None, slice]] = []
    base = 0
    for section in sections:
        if section.length:
            first = base + section.start
            source = slice(first, first + section.length)
            found.append((source, slice(section.offset, section.offset + section.length)))
        base += section.size
    return found


def _interleaved_cuts(sections: Sequence[Section]) -> list[tuple[slice | None, slice]]:
    """Returns what `_cuts` does for a source that holds group after group, each the sections' parts end to end."""
    found: list[tuple[slice | None, slice]] = []
    stride, base = sum(section.group for section in sections), 0
    for section in sections:
        done, end = section.start, section.start + section.length
        if section.group == 1:  # sections take turns
            source = slice(base + done * stride, base + end * stride, stride)
            found.append((source, slice(section.offset, section.offset + section.length)))
            done = end
        while done < end:
            group, within = divmod(done, section.group)
            count = min(section.group - within, end - done)
            first, target = group * stride + base + within, section.offset + done - section.start
            found.append((slice(first, first + count), slice(target, target + count)))
            done += count
        base += section.group
    return found


def _expert_cut(experts: Section, expert: int) -> list[tuple[slice | None, slice]]:
    """Returns where one expert's own tensor goes in the stack; nothing when another rank holds it."""
    if not experts.start <= expert < experts.start + experts.length:
        return []
    local = expert - experts.start
    return [(None, slice(local, local + 1))]


def whole(size: int) -> Section:
    """Returns the section of a dimension that every rank holds in full."""
    return Section(size=size, start=0, length=size, padded_length=size)


def split(size: int, parts: int, index: int, *, what: str, name: str | None = None) -> Section:
    """Returns part ``index`` of ``parts`` equal ones.

    Raises:
        ConfigError: ``parts`` does not divide ``size``; ``what`` names the quantity in the message.
    """
    if size % parts:
        raise ConfigError(f"{what} {size} cannot be split over {parts} ranks: choose a parallel size that divides it")
    length = size // parts
    return Section(size=size, start=index * length, length=length, padded_length=length, name=name)


def split_padded(size: int, parts: int, index: int) -> Section:
    """Returns part ``index`` of ``size`` rounded up to a multiple of ``parts``; the last ranks hold the padding."""
    padded = -(-size // parts)
    start = min(index * padded, size)
    return Section(size=size, start=start, length=min(padded, size - start), padded_length=padded)


def split_heads(heads: int, head_dim: int, parts: int, index: int, *, name: str, groups: int | None = None) -> Section:
    """Returns part ``index`` of ``heads`` heads; with more parts than heads, ``parts / heads`` ranks share each head.

    ``groups`` is in how many groups of heads a source may hold them; by default each head is one.

    Raises:
        ConfigError: neither number is a multiple of the other.
    """
    if heads % parts and parts % heads:
        raise ConfigError(f"{heads} heads and {parts} ranks: one must be a multiple of the other")
    first, count = (index * heads // parts, 1) if parts > heads else (index * (heads // parts), heads // parts)
    length = count * head_dim
    group = heads // (groups or heads) * head_dim
    size, start = heads * head_dim, first * head_dim
    return Section(size=size, start=start, length=length, padded_length=length, name=name, group=group)


def fused(sections: Sequence[Section]) -> tuple[Section, ...]:
    """Returns the sections placed one after the other in the parameter."""
    placed, offset = [], 0
    for section in sections:
        placed.append(replace(section, offset=offset))
        offset += section.padded_length
    return tuple(placed)


def replicated(*shape: int) -> ShardSpec:
    """Returns the spec of a parameter that every rank holds in full."""
    return ShardSpec(dims=tuple((whole(size),) for size in shape))
