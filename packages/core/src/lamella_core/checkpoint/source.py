"""WeightSource: the tensors of a Hugging Face directory by name, read slice by slice.

Files are memory-mapped and read in pieces whose pages are given back at once, so that reading costs the process no
resident memory beyond the destination and one piece. PyTorch ``.bin`` files are opened only by
``torch.load(weights_only=True)``, which runs no code from the file.
"""

from __future__ import annotations

import ctypes
import functools
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch

from lamella_core.checkpoint.formats import read_json_object
from lamella_core.checkpoint.safetensors_file import SafetensorsFile
from lamella_core.errors import CheckpointError

_PIECE_BYTES = 16 << 20  # read between two releases of pages
_PAGE = 4096
_MADV_DONTNEED = 4

Slices = tuple[slice, ...]


class TensorFile(Protocol):
    """An opened weight file."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def view(self, name: str) -> torch.Tensor:
        """Returns the whole tensor, sharing the mapped file where the format allows."""
        ...

    def release(self, name: str) -> None:
        """Lets the tensor's pages leave the process's resident set."""
        ...


class SafetensorsTensors:
    """`TensorFile` over a safetensors file."""

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)

    def names(self) -> Iterable[str]:
        return self._file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._file.info(name).dtype

    def view(self, name: str) -> torch.Tensor:
        return self._file.tensor(name)

    def release(self, name: str) -> None:
        self._file.release(name)


class TorchTensors:
    """`TensorFile` over a ``.bin`` state dict. Files of the format before torch 1.6 cannot be mapped: read at once."""

    def __init__(self, path: Path) -> None:
        self._tensors = load_state_dict(path)
        self._mapped = _mapped_ranges(path)

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def view(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        storage = self._tensors[name].untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if any(low <= begin and end <= high for low, high in self._mapped):
            _drop_pages(begin, end)


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a ``.bin`` file, memory-mapped where its format allows; runs no code from it.

    Raises:
        CheckpointError: missing, damaged, asks for code to be run, or holds something else than named dense tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole directory again")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged or holds more than tensors, and code from a checkpoint is never run; "
            "convert it to safetensors where you trust it"
        ) from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a PyTorch weight file: {reason}; copy it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; a state dict (name -> tensor) is needed")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(tensor).__name__}; only named tensors are read")
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense tensor")
    return dict(loaded)


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Returns the address ranges of this process that map ``path`` (Linux; elsewhere none)."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return []
    real, ranges = str(path.resolve()), []
    for line in maps.read_text(errors="replace").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5] == real:
            low, _, high = fields[0].partition("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges


@functools.lru_cache(maxsize=1)
def _madvise() -> Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int] | None:
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None


def _drop_pages(begin: int, end: int) -> None:
    """Releases whole pages inside ``[begin, end)``, addresses in a private, never written file mapping."""
    advise, first = _madvise(), (begin + _PAGE - 1) // _PAGE * _PAGE
    if advise is not None and end > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t((end - first) // _PAGE * _PAGE), _MADV_DONTNEED)


class WeightSource:
    """Tensors of a Hugging Face directory: one or many safetensors files, or ``.bin`` files where there are none.

    Files open when first needed. `close` (or dropping the object) unmaps them once no view is left.

    Raises:
        CheckpointError: no weight file, a damaged index, or an index that names a missing file or tensor.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._open: dict[str, TensorFile] = {}
        self._file_of = _locate(self.directory, self._opened)

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype(name)

    def path(self, name: str) -> Path:
        """Returns the file that holds a tensor."""
        self._of(name)
        return self.directory / self._file_of[name]

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        """Returns a copy of ``tensor[slices]`` in the source's dtype."""
        view = self._of(name).view(name)[slices]
        out = torch.empty(view.shape, dtype=view.dtype)
        self.copy(out, name, slices)
        return out

    def copy(self, out: torch.Tensor, name: str, slices: Slices = (), *, transpose: bool = False) -> None:
        """Fills ``out`` with ``tensor[slices]`` (then transposed), cast to ``out``'s dtype.

        Reads only the pages that hold the slice, a piece at a time.

        Args:
            out: destination; its shape must be that of the slice (transposed).
            name: source tensor.
            slices: one slice per leading dimension of the tensor as stored.
            transpose: swap the two dimensions of the slice.

        Raises:
            CheckpointError: no such tensor, or ``out`` has another shape.
        """
        file = self._of(name)
        view, target = file.view(name)[slices], out.mT if transpose else out
        if view.shape != target.shape:
            raise CheckpointError(
                f"{self.path(name)}: tensor {name!r}{list(slices) or ''} has shape {list(view.shape)}, "
                f"the model needs {list(target.shape)}"
            )
        if view.dim() == 0:
            target.copy_(view)
            return
        row_bytes = max(1, view.nbytes // max(1, view.shape[0]))
        rows = max(1, _PIECE_BYTES // row_bytes)
        for begin in range(0, view.shape[0], rows):
            target[begin : begin + rows].copy_(view[begin : begin + rows])
            file.release(name)

    def close(self) -> None:
        """Forgets the opened files. Idempotent; a later read opens them again."""
        self._open.clear()

    def _of(self, name: str) -> TensorFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}")
        return self._opened(self._file_of[name])

    def _opened(self, file_name: str) -> TensorFile:
        if file_name not in self._open:
            path = self.directory / file_name
            is_safetensors = path.suffix == ".safetensors"
            self._open[file_name] = SafetensorsTensors(path) if is_safetensors else TorchTensors(path)
        return self._open[file_name]


def _locate(directory: Path, opened: Callable[[str], TensorFile]) -> dict[str, str]:
    """Returns tensor name -> file name, by the first that exists: safetensors (index, single, any), .bin (same)."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; pass a model directory")
    for index, single, pattern in (
        ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (directory / index).is_file():
            return _read_index(directory / index, opened)
        files = [single] if (directory / single).is_file() else sorted(p.name for p in directory.glob(pattern))
        if files:
            return _union(directory, files, opened)
    raise CheckpointError(
        f"{directory} holds no weights: expected model.safetensors, model.safetensors.index.json with its shards, or "
        "pytorch_model.bin; check that the download is complete"
    )


def _union(directory: Path, files: list[str], opened: Callable[[str], TensorFile]) -> dict[str, str]:
    file_of: dict[str, str] = {}
    for file in files:
        for name in opened(file).names():
            if name in file_of:
                raise CheckpointError(
                    f"{directory}: tensor {name!r} is in both {file_of[name]} and {file}, and no index says which "
                    "counts; remove the file that does not belong to the model"
                )
            file_of[name] = file
    return file_of


def _read_index(path: Path, opened: Callable[[str], TensorFile]) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is damaged: weight_map must map tensor names to file names; copy it again")
    suffix = ".safetensors" if path.name.startswith("model.safetensors") else ".bin"
    for file in set(map(str, weight_map.values())):
        if Path(file).name != file or not file.endswith(suffix):
            raise CheckpointError(f"{path} names the file {file!r}; only {suffix} files beside the index are read")
    missing = sorted({file for file in weight_map.values() if not (path.parent / file).is_file()})
    if missing:
        raise CheckpointError(
            f"{path.parent}: {len(missing)} of {len(set(weight_map.values()))} weight files are missing: "
            f"{', '.join(missing)}; copy the whole directory again"
        )
    absent = [name for name, file in weight_map.items() if name not in set(opened(file).names())]
    if absent:
        raise CheckpointError(f"{path} lists tensors that their files do not hold: {', '.join(sorted(absent))}")
    return dict(weight_map)
