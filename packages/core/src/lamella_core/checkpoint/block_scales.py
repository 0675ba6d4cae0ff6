"""Float8 weights with one scale per block of rows and columns (DeepSeek-V3, 2024), read as the numbers they stand for.

Such a matrix has beside it ``<name>_scale_inv`` [rows / block, columns / block], rounded up: what the numbers of each
block are multiplied by. config.json says how large blocks are. Whoever reads a `BlockScaledSource` sees float32
tensors, of which a part is widened as it is asked for, and no scales; the weights may then be quantized anew.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lamella_core.checkpoint.formats import CONFIG_FILE, read_json_object
from lamella_core.checkpoint.mxfp4 import Mxfp4Source
from lamella_core.checkpoint.source import WeightSource
from lamella_core.errors import CheckpointError
from lamella_core.kernels.fp8 import FLOAT8
from lamella_core.layers.sharding import Slices
from lamella_core.quantization.hugging_face import is_mxfp4, weight_block_size

logger = logging.getLogger(__name__)

_SUFFIX = "_scale_inv"
_NUMBERS_AT_ONCE = 1 << 22


def open_source(directory: Path | str) -> WeightSource:
    """Returns the tensors of a Hugging Face directory; those with scales per block and MXFP4 as what they stand for.

    Raises:
        CheckpointError: files are missing or damaged, or float8 tensors lack their scales.
        ConfigError: config.json gives blocks of an impossible size.
    """
    path = Path(directory) / CONFIG_FILE
    config = read_json_object(path) if path.is_file() else {}
    if is_mxfp4(config):
        logger.info("%s: MXFP4 weights are widened as they are read", directory)
        return Mxfp4Source(directory)
    block = weight_block_size(config, str(path))
    if block is None:
        return WeightSource(directory)
    logger.info(
        "%s: float8 weights with scales per block of %s are widened as they are read; "
        "QuantConfig('FP8_PER_CHANNEL_PER_TOKEN') holds them in float8 with one scale per output feature",
        directory, list(block),
    )  # fmt: skip
    return BlockScaledSource(directory, block)


class BlockScaledSource(WeightSource):
    """A `WeightSource` whose float8 tensors appear in float32.

    Args:
        directory: of the weights.
        block: rows and columns that share a scale.

    Raises:
        CheckpointError: as for `WeightSource`; a float8 tensor that is no matrix, or lacks scales of its shape.
    """

    def __init__(self, directory: Path | str, block: tuple[int, int]) -> None:
        super().__init__(directory)
        self._block = block
        stored = super().names()
        self._scaled = {name for name in stored if super(BlockScaledSource, self).dtype(name) == FLOAT8}
        self._hidden = {name + _SUFFIX for name in self._scaled}
        missing = sorted(self._hidden - set(stored))
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} scales of float8 weights are missing: {', '.join(missing)}. Float8 "
                "weights mean nothing without them: copy the whole directory again"
            )
        for name in self._scaled:
            self._check(name)

    def _check(self, name: str) -> None:
        shape, scales = super().shape(name), super().shape(name + _SUFFIX)
        need = tuple(-(-size // block) for size, block in zip(shape, self._block))
        if len(shape) != len(self._block) or scales != need:
            raise CheckpointError(
                f"{self.path(name)}: {name}{list(shape)} has scales of shape {list(scales)}; blocks of "
                f"{list(self._block)} (weight_block_size in config.json) need {list(need)}, and a matrix"
            )

    def names(self) -> list[str]:
        return [name for name in super().names() if name not in self._hidden]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._scaled else super().dtype(name)

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        if name not in self._scaled:
            return super().read(name, slices)
        rows, columns = self._ranges(name, slices)
        out = torch.empty(len(rows), len(columns))
        self.copy(out, name, slices)
        return out

    def copy(self, out: torch.Tensor, name: str, slices: Slices = (), *, transpose: bool = False) -> None:
        if name not in self._scaled:
            super().copy(out, name, slices, transpose=transpose)
            return
        rows, columns = self._ranges(name, slices)
        target = out.mT if transpose else out
        if target.shape != (len(rows), len(columns)):
            raise CheckpointError(
                f"{self.path(name)}: tensor {name!r}{list(slices) or ''} has shape {[len(rows), len(columns)]}, "
                f"the model needs {list(target.shape)}"
            )
        scales = self._scales(name)[:, torch.arange(columns.start, columns.stop) // self._block[1]]
        step = max(1, _NUMBERS_AT_ONCE // max(1, len(columns)))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            cut = (slice(part.start, part.stop), slice(columns.start, columns.stop))
            stored = torch.empty(len(part), len(columns), dtype=FLOAT8)
            super().copy(stored, name, cut)
            factors = scales[torch.arange(part.start, part.stop) // self._block[0]]
            target[begin : begin + step].copy_(stored.float().mul_(factors))

    def _ranges(self, name: str, slices: Slices) -> tuple[range, range]:
        """Returns the rows and columns that slices of a matrix name."""
        shape = super().shape(name)
        whole = [*slices, *[slice(None)] * (len(shape) - len(slices))]
        rows, columns = (range(*cut.indices(size)) for cut, size in zip(whole, shape, strict=True))
        return rows, columns

    def _scales(self, name: str) -> torch.Tensor:
        scales = super().read(name + _SUFFIX).float()
        if not bool((scales.isfinite() & (scales >= 0.0)).all()):
            raise CheckpointError(
                f"{self.path(name)}: {name}{_SUFFIX} holds a scale that is not a positive number; copy it again"
            )
        return scales
