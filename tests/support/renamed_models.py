"""Architectures whose published checkpoints have other names and layouts than transformers gives the same network.

The oracle is transformers' class; its config.json and tensors are rewritten into the published form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Renamed:
    """How the published form is made from transformers' own."""

    oracle: str  # transformers' class
    config: Callable[[Config], Config]
    tensors: Callable[[Config, Tensors], Tensors] = lambda config, tensors: tensors


def _santacoder_config(config: Config) -> Config:
    kind = "multiquery" if config.pop("multi_query") else "multihead"
    return {**config, "model_type": "gpt2", "attention_head_type": kind}


def _santacoder_tensors(config: Config, tensors: Tensors) -> Tensors:
    """Queries apart from the shared key and value, or all three side by side; weights [in, out]."""
    heads, hidden, out = config["n_head"], config["n_embd"], {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if path.endswith("c_attn") and config["multi_query"]:
            q, kv = tensor.split([hidden, tensor.shape[0] - hidden])
            parts = {f"{path[:-6]}q_attn.{leaf}": q, f"{path[:-6]}kv_attn.{leaf}": kv}
        elif path.endswith("c_attn"):
            parts = {name: tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)}
        else:
            parts = {name: tensor}
        is_linear = leaf == "weight" and (".attn." in path or ".mlp." in path)
        out.update({k: (v.T.contiguous() if is_linear else v.contiguous()) for k, v in parts.items()})
    return out


def _phimoe_config(config: Config) -> Config:
    """Rope parameters as older files have them."""
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    return {**config, "rope_theta": theta, "rope_scaling": {"type": kind, **rope}}


def _refined_web_config(config: Config) -> Config:
    """The 40B's model type stands for new_decoder_architecture."""
    is_new = config.pop("new_decoder_architecture")
    names = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv"}
    config = {names.get(name, name): value for name, value in config.items()}
    return {**config, "model_type": "RefinedWeb" if is_new else "RefinedWebModel"}


def _seeing_config(model_type: str) -> Callable[[Config], Config]:
    return lambda config: {"model_type": model_type, "text_config": config, "dtype": config["dtype"]}


def _seeing_tensors(config: Config, tensors: Tensors) -> Tensors:
    """The decoder's tensors under a name of their own, beside those that see."""
    seen = {"vision_model.gated_positional_embedding.gate": torch.ones(1), "multi_modal_projector.bias": torch.ones(3)}
    return {**{f"language_model.{name}": tensor for name, tensor in tensors.items()}, **seen}


RENAMED: dict[str, Renamed] = {
    "Llama4ForConditionalGeneration": Renamed("Llama4ForCausalLM", _seeing_config("llama4"), _seeing_tensors),
    "MllamaForConditionalGeneration": Renamed("MllamaForCausalLM", _seeing_config("mllama"), _seeing_tensors),
    "PhiMoEForCausalLM": Renamed("PhimoeForCausalLM", _phimoe_config),
    "GPT2LMHeadCustomModel": Renamed("GPTBigCodeForCausalLM", _santacoder_config, _santacoder_tensors),
    "RWForCausalLM": Renamed("FalconForCausalLM", _refined_web_config),
}
