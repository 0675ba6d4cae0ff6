"""Writing an engine directory: rank by rank into a temporary sibling, which then takes the directory's name at once."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lamella_core.checkpoint.formats import ENGINE_FILE, rank_file, read_json_object
from lamella_core.checkpoint.safetensors_file import atomic_write, write_safetensors
from lamella_core.engine.checksum import json_checksum, tensor_checksum
from lamella_core.engine.spec import CHECKSUM_KEY, EngineSpec
from lamella_core.errors import CheckpointError, EngineFormatError

_VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken", "ice_text.model",
    "cog-pretrain.model",
)  # fmt: skip
# What tokenizer loaders read from a model directory.
TOKENIZER_FILES = (
    *_VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "spiece.model", "chat_template.jinja", "chat_template.json", "generation_config.json", "config.json",
)  # fmt: skip
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((directory / name).is_file() for name in _VOCABULARY_FILES)


class EngineWriter:
    """Writes the engine of one or several ranks, holding one rank's weights at a time.

    Use::

        with EngineWriter(directory) as writer:
            for rank in range(world_size):
                engine = build(...)  # the model of this rank
                writer.add_rank(rank, engine.spec, engine.weights(rank))

    The directory appears, complete and on disk, when the block ends. An error or an interruption before leaves what was
    there. An engine that is replaced may be in use: its open files stay valid.

    Raises:
        EngineFormatError: the directory exists and holds something else than an engine, or cannot be replaced; ranks
            are missing at the end.
        CheckpointError: it cannot be written (disk full, no permission).
    """

    def __init__(self, directory: Path | str, *, tokenizer_dir: Path | str | None = None) -> None:
        self.directory = Path(os.path.realpath(directory))  # a link stays, what it points to is replaced
        self._tokenizer_dir = Path(tokenizer_dir) if tokenizer_dir is not None else None
        self._work = self.directory.with_name(f".{self.directory.name}.{secrets.token_hex(4)}.tmp")
        self._spec: EngineSpec | None = None
        self._ranks: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> EngineWriter:
        _refuse_foreign(self.directory)
        try:
            self._work.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be made: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    @property
    def work_dir(self) -> Path:
        """Where the files are until the block ends; `write_rank` writes there from other processes."""
        return self._work

    def add_rank(self, rank: int, spec: EngineSpec, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes one rank's file. The spec of the first rank is kept; plans of later ranks' own layers are added."""
        self.adopt_rank(rank, spec, write_rank(self._work, rank, weights))

    def adopt_rank(self, rank: int, spec: EngineSpec, entry: Mapping[str, Any]) -> None:
        """Takes over a file that `write_rank` wrote into `work_dir`, and returned ``entry`` for."""
        if self._spec is None:
            self._spec = spec
        else:
            merged = {**spec.plans, **self._spec.plans}
            if any(spec.plans[name] != merged[name] for name in spec.plans):
                raise EngineFormatError(f"rank {rank} was built with other kernels than the ranks before: pass like=")
            self._spec = replace(self._spec, plans=merged)
        self._ranks[rank] = dict(entry)

    def _commit(self) -> None:
        if self._spec is None:
            raise EngineFormatError(f"{self.directory}: no rank was written")
        expected = set(range(self._spec.model.mapping.world_size))
        if set(self._ranks) != expected:
            absent = sorted(expected - set(self._ranks))
            raise EngineFormatError(
                f"{self.directory}: of the engine's {len(expected)} ranks {absent} were not written"
            )
        tokenizer = self._copy_tokenizer()
        files = {rank_file(rank): self._ranks[rank] for rank in sorted(self._ranks)}
        with atomic_write(self._work / ENGINE_FILE) as file:
            content = {**self._spec.to_dict(), "files": files, "tokenizer_files": tokenizer}
            file.write(json.dumps({**content, CHECKSUM_KEY: json_checksum(content)}, indent=1).encode())
        _sync_directory(self._work)
        try:
            _take_name(self._work, self.directory)
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be written: {error}") from error

    def _copy_tokenizer(self) -> list[str]:
        if self._tokenizer_dir is None:
            return []
        present = [name for name in TOKENIZER_FILES if (self._tokenizer_dir / name).is_file()]
        for name in present:
            try:
                with atomic_write(self._work / name) as file:
                    file.write((self._tokenizer_dir / name).read_bytes())
            except OSError as error:
                raise CheckpointError(f"{self._tokenizer_dir / name} cannot be copied: {error}") from error
        return present


def write_rank(directory: Path, rank: int, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes one rank's weights; returns what engine.json says of the file, JSON-ready."""
    path = directory / rank_file(rank)
    write_safetensors(path, weights)
    return {
        "bytes": path.stat().st_size,
        "checksums": {name: tensor_checksum(tensor) for name, tensor in weights.items()},
    }


def _refuse_foreign(directory: Path) -> None:
    """Lets only an engine's own files be replaced, in a directory whose name another one can take.

    Raises:
        EngineFormatError: the directory holds other files, is mounted, or is the one that the process works in.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise EngineFormatError(f"{directory} is a file; choose a directory for the engine")
    fixed = "a mount point" if directory.is_mount() else "the current directory" if directory == Path.cwd() else None
    if fixed:
        raise EngineFormatError(
            f"{directory} is {fixed}; an engine's directory is replaced as a whole, choose one inside it, such as "
            f"{directory / 'engine'}"
        )
    entries = {entry.name for entry in directory.iterdir()}
    own: Iterable[str] = ()
    if ENGINE_FILE in entries:
        with suppress(CheckpointError):
            data = read_json_object(directory / ENGINE_FILE)
            own = [ENGINE_FILE, *data.get("files", {}), *data.get("tokenizer_files", [])]
    if foreign := sorted(entries.difference(own)):
        raise EngineFormatError(
            f"{directory} holds files that are not an engine's ({', '.join(foreign[:5])}); choose another or an empty "
            "directory"
        )


def _take_name(work: Path, directory: Path) -> None:
    """Renames ``work`` to ``directory`` and removes what was there."""
    if not directory.exists():
        os.rename(work, directory)
    elif not _exchange(work, directory):
        aside = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.old")
        os.rename(directory, aside)
        try:
            os.rename(work, directory)
        except OSError:
            os.rename(aside, directory)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_directory(directory.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two directories in one step (Linux `renameat2`); returns whether that worked."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _sync_directory(directory: Path) -> None:
    """Makes a directory's entries durable, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
