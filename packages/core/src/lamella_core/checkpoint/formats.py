"""Which of the three kinds of model directory a path is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from lamella_core.errors import CheckpointError

ModelFormat = Literal["hugging_face", "checkpoint", "engine"]

CONFIG_FILE = "config.json"
ENGINE_FILE = "engine.json"
CHECKPOINT_KEY = "lamella_checkpoint"  # in config.json: schema version of a Lamella checkpoint
_JSON_MAX_BYTES = 64 << 20


def rank_file(rank: int | str) -> str:
    """Returns the name of a rank's weight file in a checkpoint or an engine; "*" makes the pattern of all ranks'."""
    return f"rank{rank}.safetensors"


def detect_format(directory: Path | str) -> ModelFormat:
    """Returns whether ``directory`` is a Hugging Face directory, a Lamella checkpoint or an engine.

    Raises:
        CheckpointError: not a directory, or none of the three; the message says what was looked for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {state}; pass a model directory")
    if (directory / ENGINE_FILE).is_file():
        return "engine"
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{directory} is no model directory: it has neither {ENGINE_FILE} (an engine) nor {CONFIG_FILE} (a Hugging "
            "Face directory or a Lamella checkpoint)"
        )
    return "checkpoint" if CHECKPOINT_KEY in read_json_object(directory / CONFIG_FILE) else "hugging_face"


def read_json_object(path: Path, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """Returns the JSON object in ``path``.

    Raises:
        CheckpointError: (or ``error``) missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _JSON_MAX_BYTES:
            raise ValueError(f"larger than {_JSON_MAX_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise error(f"{path} is missing; copy the whole directory again") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged: {cause}; copy it again") from cause
    if not isinstance(data, dict):
        raise error(f"{path} is damaged: it holds a {type(data).__name__}, not an object; copy it again")
    return data
