"""The safetensors format: a bounds-checked, memory-mapped reader and a streaming, atomic writer.

Format (https://github.com/huggingface/safetensors, README): 8 bytes little-endian header length, a JSON header that
maps tensor names to ``{dtype, shape, data_offsets}``, the tensors' bytes. A foreign file's header is hostile input:
every size is checked in Python integers before memory is touched.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lamella_core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 64  # bytes; a cache line, and the widest vector load
_MAX_DIMS = 16
_MAX_DIM_SIZE = 1 << 48
_WRITE_CHUNK_BYTES = 64 << 20

DTYPE_NAMES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One header entry. ``begin`` and ``end`` are byte offsets in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """A memory-mapped safetensors file. Tensors share the mapping, which lives as long as any of them does.

    The mapping is private: writing to a tensor copies the touched pages and never reaches the file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.file_bytes = os.fstat(file.fileno()).st_size
                self.tensors, self.metadata = read_header(file, self.file_bytes, self.path)
                self._map = mmap.mmap(file.fileno(), self.file_bytes, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} is missing; copy the whole directory again") from error
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def info(self, name: str) -> TensorInfo:
        """Returns the header entry of a tensor.

        Raises:
            CheckpointError: no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}") from None

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor that shares the mapped file; a misaligned one is copied."""
        info = self.info(name)
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        count = math.prod(info.shape)
        if info.begin % info.dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=info.begin).view(info.shape)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.num_bytes, offset=info.begin)
        return raw.clone().view(info.dtype).view(info.shape)

    def prefetch(self) -> None:
        """Asks the system to read the whole file into its cache, ahead of use and in large requests."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED)

    def release(self, name: str) -> None:
        """Tells the system that this process is done with a tensor's pages: they leave its resident set.

        The page cache keeps them, and a later read maps them again. Without `madvise` this does nothing. Pages of a
        tensor that was written to would lose the writes.
        """
        info = self.info(name)
        begin = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if info.num_bytes and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, info.end - begin)


def read_header(file: BinaryIO, file_bytes: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of an open file of ``file_bytes`` bytes; returns its tensors and its metadata.

    Raises:
        CheckpointError: truncated, not safetensors, or an entry that does not fit the file.
    """
    prefix = file.read(8)
    if prefix.startswith(b"version "):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    if len(prefix) < 8:
        raise CheckpointError(f"{path} is truncated: it has {file_bytes} bytes; copy it again")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file: its header would take {length} bytes (at most "
            f"{MAX_HEADER_BYTES}), the file has {file_bytes}; copy it again"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); copy the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ must map strings to strings")
    tensors = {name: _entry(name, entry, 8 + length, file_bytes, path) for name, entry in header.items()}
    _refuse_overlap(tensors, path)
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _is_size(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _entry(name: str, entry: object, data_begin: int, file_bytes: int, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{path}: tensor {name!r} needs dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(DTYPE_NAMES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_size(d, _MAX_DIM_SIZE) for d in shape):
        raise CheckpointError(f"{path}: tensor {name!r} has an impossible shape {str(shape)[:200]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o, _MAX_DIM_SIZE) for o in offsets):
        raise CheckpointError(f"{path}: tensor {name!r} has impossible data_offsets {str(offsets)[:200]}")
    begin, end = data_begin + offsets[0], data_begin + offsets[1]
    num_bytes = math.prod(shape) * DTYPE_NAMES[dtype].itemsize
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} {dtype} {shape} takes {num_bytes} bytes, its offsets {end - begin}"
        )
    if end > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {end}, the file has {file_bytes}; copy it again"
        )
    return TensorInfo(DTYPE_NAMES[dtype], tuple(shape), begin, end)


def _refuse_overlap(tensors: Mapping[str, TensorInfo], path: Path) -> None:
    previous, previous_end = "", 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.num_bytes and info.begin < previous_end:
            raise CheckpointError(f"{path}: tensors {previous!r} and {name!r} overlap; the header is damaged")
        if info.num_bytes:
            previous, previous_end = name, info.end


def write_safetensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes ``tensors`` to ``path`` without a second copy of them in memory.

    The file appears under its name only when complete and on disk. Tensors whose size is a multiple of `ALIGNMENT` come
    first, so that these start at aligned offsets and a reader can use them where they lie.

    Raises:
        CheckpointError: a dtype that the format does not have, or the disk is full.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda n: -tensors[n].dtype.itemsize if tensors[n].nbytes % ALIGNMENT else -ALIGNMENT)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAME_OF_DTYPE:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
        header[name] = {
            "dtype": _NAME_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            _write_tensor(file, tensors[name])


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    if tensor.numel() == 0:
        return
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    for begin in range(0, len(raw), _WRITE_CHUNK_BYTES):
        file.write(raw[begin : begin + _WRITE_CHUNK_BYTES])


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside ``path`` that takes its name on success, after fsync; an error leaves no trace.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
