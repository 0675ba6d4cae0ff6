"""AutoConfig and AutoModelForCausalLM: the class is chosen by config.json; no code of a model's repository runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lamella_core.checkpoint.formats import detect_format
from lamella_core.checkpoint.native import read_checkpoint_config
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig, read_hf_config
from lamella_core.hub import resolve_model_dir
from lamella_core.mapping import Mapping
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import get_model_class
from lamella_core.quantization.config import QuantConfig

PathOrId = str | os.PathLike[str]


class AutoConfig:
    """Reads a model's configuration. Not instantiated."""

    @staticmethod
    def from_hugging_face(
        dir_or_id: PathOrId,
        dtype: str | torch.dtype = "auto",
        mapping: Mapping | None = None,
        quant_config: QuantConfig | None = None,
        trust_remote_code: bool = False,
        **overrides: Any,
    ) -> ModelConfig:
        """Returns the configuration of a Hugging Face directory or hub id; only its JSON files are read.

        Args:
            dir_or_id: local directory with a config.json, or a hub id.
            dtype: "float32", "float16", "bfloat16"; "auto" takes what config.json says.
            mapping: how the model is spread over ranks; by default one rank.
            quant_config: how to quantize; weights that are quantized say so themselves, and may not contradict it.
            trust_remote_code: accepted for ported scripts and without effect: nothing of the repository is executed.
            overrides: values that replace those of config.json, under its names or `ModelConfig`'s.

        Raises:
            UnsupportedModelError: (a NotImplementedError) the architecture is not supported; lists those that are.
            ConfigError: an unknown override, or values that are unsupported or contradict each other.
            CheckpointError: no such directory, config.json missing or damaged.
        """
        directory = resolve_model_dir(dir_or_id, weights=False)
        model_class, hf = _inspect(directory, overrides)
        return hf.resolve(model_class.config_class, dtype=dtype, mapping=mapping, quantization=quant_config)


class AutoModelForCausalLM:
    """Makes the model class that a directory asks for. Not instantiated."""

    @staticmethod
    def get_model_class(dir_or_id: PathOrId) -> type[CausalLM]:
        """Returns the class that implements the model of a directory (Hugging Face or Lamella checkpoint) or hub id.

        Raises:
            UnsupportedModelError: (a NotImplementedError) the architecture is not supported; lists those that are.
            CheckpointError: no such directory, config.json missing or damaged.
        """
        directory = resolve_model_dir(dir_or_id, weights=False)
        if detect_format(directory) == "checkpoint":
            return read_checkpoint_config(directory)[0]
        return _inspect(directory, {})[0]

    get_trtllm_model_class = get_model_class  # the name that ported scripts use

    @staticmethod
    def from_hugging_face(
        dir_or_id: PathOrId,
        dtype: str | torch.dtype = "auto",
        mapping: Mapping | None = None,
        quant_config: QuantConfig | None = None,
        load_format: str = "auto",
        trust_remote_code: bool = False,
        device: str = "cpu",
        **overrides: Any,
    ) -> CausalLM:
        """Returns this rank's model with the weights of a Hugging Face directory or hub id.

        Arguments and errors are those of `CausalLM.from_hugging_face`; ``trust_remote_code`` has no effect.
        """
        directory = resolve_model_dir(dir_or_id, weights=load_format != "dummy")
        model_class, _ = _inspect(directory, {})
        return model_class.from_hugging_face(directory, dtype, mapping, quant_config, load_format, device, **overrides)

    @staticmethod
    def from_checkpoint(directory: PathOrId, rank: int = 0, device: str = "cpu") -> CausalLM:
        """Returns the model of a Lamella checkpoint directory as ``rank`` holds it, on ``device``.

        Raises:
            CheckpointError: files are missing, damaged or do not fit the configuration.
            ConfigError: no such device.
        """
        model_class, _ = read_checkpoint_config(Path(directory), rank)
        return model_class.from_checkpoint(directory, rank, device)


def _inspect(directory: Path, overrides: dict[str, Any]) -> tuple[type[CausalLM], HfConfig]:
    hf = read_hf_config(directory, overrides)
    return get_model_class(hf.architecture, hf.model_type), hf
