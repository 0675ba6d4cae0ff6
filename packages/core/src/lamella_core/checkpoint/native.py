"""Lamella checkpoints: a converted model, one weight file per rank.

``config.json`` holds ``{"lamella_checkpoint": 1, "config": {...}}`` and ``rank{r}.safetensors`` the rank's parameters
under their own names, in the plain layout. Loading maps the file: parameters share its pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lamella_core.checkpoint.formats import CHECKPOINT_KEY, CONFIG_FILE, rank_file, read_json_object
from lamella_core.checkpoint.layout import plain_weights
from lamella_core.checkpoint.safetensors_file import SafetensorsFile, atomic_write, write_safetensors
from lamella_core.config import ModelConfig
from lamella_core.errors import CheckpointError, ConfigError
from lamella_core.layers.parameter import set_parameter

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

SCHEMA_VERSION = 1

L = TypeVar("L", bound="CausalLM")


def save_checkpoint(model: CausalLM, directory: Path | str) -> None:
    """Writes a rank's weights and the configuration; ranks may be written one after another into one directory.

    Each file appears complete or not at all.

    Raises:
        CheckpointError: the directory holds another kind of model or another model's ranks, or cannot be written.
    """
    directory = Path(directory)
    config = {CHECKPOINT_KEY: SCHEMA_VERSION, "config": model.config.to_dict()}
    path = directory / CONFIG_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made: {error}") from error
    stored = read_json_object(path) if path.exists() else config
    if CHECKPOINT_KEY not in stored:
        raise CheckpointError(f"{directory} holds another kind of model; choose an empty directory")
    own = {rank_file(rank) for rank in range(model.config.mapping.world_size)}
    others = sorted(entry.name for entry in directory.glob(rank_file("*")) if entry.name not in own)
    if others or (len(own) > 1 and stored != config):
        named = f" ({', '.join(others)})" if others else ""
        raise CheckpointError(f"{directory} holds ranks of another model{named}; choose an empty directory")
    write_safetensors(directory / rank_file(model.config.mapping.rank), plain_weights(model))
    with atomic_write(path) as file:
        file.write(json.dumps(config, indent=2).encode())


def load_checkpoint(model_class: type[L], directory: Path | str, rank: int = 0, device: str = "cpu") -> L:
    """Returns the model of a Lamella checkpoint as ``rank`` holds it.

    On a CPU its parameters share the mapped file; to a GPU they are copied from it, one after another.

    Raises:
        CheckpointError: a file is missing or damaged, or holds another architecture or other tensors than the
            configuration asks for; the message names all of them.
    """
    directory = Path(directory)
    found, config = read_checkpoint_config(directory, rank)
    if found is not model_class and not issubclass(model_class, found):
        raise CheckpointError(
            f"{directory} holds a {found.__name__}, not a {model_class.__name__}; load it with its class"
        )
    model = model_class.empty(config, device)
    file = SafetensorsFile(directory / rank_file(rank))
    parameters = dict(model.named_parameters())
    problems = [f"missing: {name}" for name in parameters.keys() - file.tensors.keys()]
    problems += [f"unexpected: {name}" for name in file.tensors.keys() - parameters.keys()]
    for name in parameters.keys() & file.tensors.keys():
        need, info = parameters[name], file.info(name)
        if tuple(need.shape) != info.shape or need.dtype != info.dtype:
            have = f"{info.dtype} {list(info.shape)}"
            problems.append(f"wrong: {name} is {have}, the configuration needs {need.dtype} {list(need.shape)}")
    if problems:
        raise CheckpointError(f"{file.path} does not fit {CONFIG_FILE} beside it:\n  " + "\n  ".join(sorted(problems)))
    for name in parameters:
        set_parameter(model, name, file.tensor(name).to(device))
        if device != "cpu":
            file.release(name)
    return model


def read_checkpoint_config(directory: Path | str, rank: int = 0) -> tuple[type[CausalLM], ModelConfig]:
    """Returns the model class and configuration of a Lamella checkpoint, seen from ``rank``.

    Raises:
        CheckpointError: not a Lamella checkpoint, damaged, written by a newer version, or without that rank.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} is no Lamella checkpoint: there is no {path}; check the path")
    data = read_json_object(path)
    if CHECKPOINT_KEY not in data:
        raise CheckpointError(
            f"{directory} is no Lamella checkpoint: {path} lacks {CHECKPOINT_KEY!r}; load a Hugging Face directory "
            "with from_hugging_face"
        )
    version = data[CHECKPOINT_KEY]
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema {version!r}; this version of Lamella reads up to {SCHEMA_VERSION}. Upgrade Lamella or "
            "convert the model again"
        )
    return stored_config(data.get("config"), rank, path, CheckpointError)


def stored_config(
    fields: object, rank: int, path: Path, error: type[CheckpointError]
) -> tuple[type[CausalLM], ModelConfig]:
    """Returns the model class and configuration that `ModelConfig.to_dict` wrote into ``path``.

    Raises:
        CheckpointError: (or ``error``) fields are missing, unknown or contradictory, or the model has no such rank.
        UnsupportedModelError: an architecture that this installation does not know.
    """
    from lamella_core.models.registry import get_model_class

    if not isinstance(fields, dict) or not all(isinstance(fields.get(k), str) for k in ("architecture", "model_type")):
        raise error(f"{path} is damaged: the model configuration names no architecture; copy it again")
    model_class: type[CausalLM] = get_model_class(fields["architecture"], fields["model_type"])
    world_size: Any = fields.get("mapping", {}).get("world_size") if isinstance(fields.get("mapping"), dict) else None
    if isinstance(world_size, int) and not 0 <= rank < world_size:
        raise error(f"{path} is of a model with {world_size} ranks; there is no rank {rank}")
    try:
        return model_class, model_class.config_class.from_dict(fields, rank)
    except (ConfigError, TypeError, ValueError, AttributeError) as cause:
        raise error(f"{path} is damaged: {cause}; copy it again") from cause
