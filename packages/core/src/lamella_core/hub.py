"""The only place that talks to the Hugging Face hub: a local directory or a hub id becomes a local directory."""

from __future__ import annotations

import os
import queue
import re
import threading
from pathlib import Path

from lamella_core.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CONFIG_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
_NOT_NEEDED = ("*/*", "consolidated*")  # folders and other formats' copies of the weights
_ANSWER_SECONDS = 5.0  # that the hub may take for its first answer
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
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        raise CheckpointError(f"{text} is a file; pass the directory that holds it")
    if isinstance(dir_or_id, os.PathLike) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"no directory {text!r}; pass an existing local directory or a hub id such as 'org/name'")
    refusal = _ask_hub(text, revision)
    directory = _download(text, revision, _CONFIG_FILES, refusal)
    for kind in ("*.safetensors", "*.bin") if weights else ():
        directory = _download(text, revision, (*_CONFIG_FILES, kind), refusal)
        if any(directory.glob(kind)):
            break
    return directory


def _ask_hub(hub_id: str, revision: str | None) -> Exception | None:
    """Asks the hub for a model; returns why it gives none, after `_ANSWER_SECONDS` at most, or None.

    A mistyped local path ends here too, often where no hub can be reached. The thread is a daemon because the look-up
    of a host name, which can take half a minute, cannot be interrupted.
    """
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, revision=revision, timeout=_ANSWER_SECONDS)
        except Exception as error:  # noqa: BLE001 - handed to the waiting thread
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, name="lamella-hub", daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER_SECONDS)
    except queue.Empty:
        return TimeoutError(f"no answer in {_ANSWER_SECONDS:g} s")


def _download(hub_id: str, revision: str | None, patterns: tuple[str, ...], refusal: Exception | None) -> Path:
    """Returns the directory with the files of these names, from the cache alone when the hub refused."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_NOT_NEEDED),
                local_files_only=refusal is not None,
            )
        )
    except Exception as error:  # noqa: BLE001 - its HTTP library raises errors of its own, which differ between versions
        cause = refusal or error
        raise CheckpointError(f"no directory {hub_id!r} here, and {_reason(cause, revision)}; {_ADVICE}") from cause


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "the hub gives this model only to those who accepted its terms (accept them, then `hf auth login`)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model (or it is private: `hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub's model has no revision {revision!r}"
    summary = str(error).partition("\n")[0]
    return f"the hub cannot be reached ({type(error).__name__}: {summary})"
