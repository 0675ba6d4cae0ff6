"""MXFP4 weights (OCP Microscaling Formats 1.0, 2023), read as the numbers they stand for.

Numbers are e2m1, two to a byte, the first in its low half; 32 neighbours of a row share a power of two. A weight
[..., K] is stored as ``<name>_blocks`` [..., K / 32, 16] and ``<name>_scales`` [..., K / 32] uint8, where s stands for
2 ** (s - 127) (e8m0) and 255 for no number. Whoever reads an `Mxfp4Source` sees ``<name>_blocks`` as [..., K] in
bfloat16, which holds all of them exactly, and no scales; what is read onto a GPU is widened there.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from lamella_core.checkpoint.source import WeightSource
from lamella_core.errors import CheckpointError
from lamella_core.layers.sharding import Slices

BLOCK = 32  # numbers that share a scale
PACKED, _SCALES = "_blocks", "_scales"  # endings of names
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1 by its low three bits; the fourth is the sign
_NO_SCALE = 255
_NUMBERS_AT_ONCE = 1 << 22


class Mxfp4Source(WeightSource):
    """A `WeightSource` whose MXFP4 tensors appear in bfloat16.

    Raises:
        CheckpointError: as for `WeightSource`; blocks that lack scales of their shape.
    """

    def __init__(self, directory: Path | str) -> None:
        super().__init__(directory)
        self._packed: dict[str, str] = {}  # blocks -> their scales
        stored = set(super().names())
        for name in stored:
            if name.endswith(PACKED) and super().dtype(name) == torch.uint8:
                self._packed[name] = name.removesuffix(PACKED) + _SCALES
        self._hidden = set(self._packed.values())
        missing = sorted(self._hidden - stored)
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} scales of MXFP4 weights are missing: {', '.join(missing)}. The "
                "weights mean nothing without them: copy the whole directory again"
            )
        for name, scales in self._packed.items():
            self._check(name, scales)

    def _check(self, name: str, scales: str) -> None:
        shape = super().shape(name)
        if len(shape) < 2 or shape[-1] != BLOCK // 2:
            raise CheckpointError(
                f"{self.path(name)}: {name}{list(shape)} holds no MXFP4 blocks; their last dimension is {BLOCK // 2}"
            )
        if super().shape(scales) != shape[:-1] or super().dtype(scales) != torch.uint8:
            raise CheckpointError(
                f"{self.path(scales)}: {scales} is {super().dtype(scales)} {list(super().shape(scales))}; {name} needs "
                f"uint8 {list(shape[:-1])}"
            )

    def names(self) -> list[str]:
        return [name for name in super().names() if name not in self._hidden]

    def shape(self, name: str) -> tuple[int, ...]:
        stored = super().shape(name)
        return (*stored[:-2], stored[-2] * BLOCK) if name in self._packed else stored

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._packed else super().dtype(name)

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        if name not in self._packed:
            return super().read(name, slices)
        out = torch.empty([len(part) for part in self._ranges(name, slices)], dtype=torch.bfloat16)
        self.copy(out, name, slices)
        return out

    def copy(self, out: torch.Tensor, name: str, slices: Slices = (), *, transpose: bool = False) -> None:
        if name not in self._packed:
            super().copy(out, name, slices, transpose=transpose)
            return
        ranges, target = self._ranges(name, slices), out.mT if transpose else out
        if target.shape != tuple(map(len, ranges)):
            raise CheckpointError(
                f"{self.path(name)}: tensor {name!r}{list(slices) or ''} has shape {list(map(len, ranges))}, "
                f"the model needs {list(target.shape)}"
            )
        first, columns = ranges[0], ranges[-1]
        blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
        inside = slice(columns.start - blocks.start * BLOCK, columns.stop - blocks.start * BLOCK, columns.step)
        middle = [slice(part.start, part.stop, part.step) for part in ranges[1:-1]]
        step = max(1, _NUMBERS_AT_ONCE * len(first) // max(1, target.numel()))
        for begin in range(0, len(first), step):
            part = first[begin : begin + step]
            cut = (slice(part.start, part.stop, part.step), *middle, blocks)
            target[begin : begin + step].copy_(self._widened(name, cut, out.device)[..., inside])

    def _widened(self, name: str, cut: Slices, device: torch.device) -> torch.Tensor:
        """Returns whole blocks of a weight, cut from the stored tensors: [..., numbers] bfloat16 on ``device``."""
        stored, scales = self._bytes(name, cut).to(device), self._bytes(self._packed[name], cut).to(device)
        if bool((scales == _NO_SCALE).any()):
            raise CheckpointError(
                f"{self.path(name)}: {self._packed[name]} holds a scale that is no number; copy the file again"
            )
        pairs, powers = _tables(device)
        numbers = pairs[stored.int()].flatten(-2)  # [..., blocks, 32]
        return (numbers * powers[scales.int()].unsqueeze(-1)).flatten(-2)

    def _bytes(self, name: str, cut: Slices) -> torch.Tensor:
        """Returns a part of a tensor as it is stored."""
        shape = super().shape(name)
        counts = [len(range(*part.indices(size))) for part, size in zip(cut, shape)]
        out = torch.empty([*counts, *shape[len(cut) :]], dtype=torch.uint8)
        super().copy(out, name, cut)
        return out

    def _ranges(self, name: str, slices: Slices) -> list[range]:
        """Returns the indices that slices of a weight name in each of its dimensions."""
        shape = self.shape(name)
        whole = [*slices, *[slice(None)] * (len(shape) - len(slices))]
        return [range(*cut.indices(size)) for cut, size in zip(whole, shape, strict=True)]


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the two numbers of each byte [256, 2] and the factor of each scale [256], both bfloat16."""
    halves = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    byte = torch.arange(256)
    pairs = torch.stack((halves[byte & 15], halves[byte >> 4]), dim=-1)
    powers = torch.ldexp(torch.ones(256, dtype=torch.float64), byte - 127)
    return pairs.bfloat16().to(device), powers.bfloat16().to(device)
