"""The only place that talks to the Hugging Face hub: a local directory or a hub id becomes a local directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lamella_core.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CONFIG_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_NOT_NEEDED = ("*/*", "consolidated*")  # folders and other formats' copies of the weights
_ADVICE = "pass a local directory that holds config.json and the weights instead, e.g. './my-model'"


def resolve_model_dir(dir_or_id: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the local directory of a model.

    Args:
        dir_or_id: an existing directory, or an id such as ``org/name`` whose files are downloaded into the hub cache.
        revision: branch, tag or commit on the hub; by default the main branch.
        weights: whether weight files are needed too.

    Raises:
        CheckpointError: neither a directory nor a hub id that can be reached; says how to pass a local directory.
    """
    text = os.fspath(dir_or_id)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{text} is a file; pass the directory that holds it")
    if not text or isinstance(dir_or_id, os.PathLike) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"no directory {text!r}; pass an existing local directory or a hub id such as 'org/name'")
    directory = _download(text, revision, _CONFIG_FILES)
    for kind in ("*.safetensors", "*.bin") if weights else ():
        directory = _download(text, revision, (*_CONFIG_FILES, kind))
        if any(directory.glob(kind)):
            break
    return directory


def _download(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NOT_NEEDED)
            )
        )
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"no directory {hub_id!r} here and no such model on the hub; {_ADVICE}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"no directory {hub_id!r} here and the hub cannot be reached ({type(error).__name__}); {_ADVICE}"
        ) from error
