"""Tiny random Hugging Face checkpoints: one or more for every architecture, covering what is special about it.

An entry of `TINY` is (architecture, variant) -> keyword arguments of the transformers config class. `hf_dir` saves the
model once per session; weights are seeded and large enough that logits differ clearly.
"""

from __future__ import annotations

import functools
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

from tests.references.registry import REFERENCES
from tests.support.renamed_models import RENAMED
from tests.support.tiny_base import BASE
from tests.support.tiny_dense import DENSE
from tests.support.tiny_experts import EXPERTS
from tests.support.tiny_gpt import EAGER_IS_WRONG, GPT_LINE
from tests.support.tiny_latent import LATENT
from tests.support.tiny_others import NORMS_AROUND_ZERO, OTHERS
from tests.support.tiny_special import SPECIAL
from tests.support.tiny_state_space import STATE_SPACE

_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20, "factor": 4.0,
         "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}  # fmt: skip


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {**BASE, "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


TINY: dict[str, dict[str, dict[str, Any]]] = {
    **DENSE,
    **GPT_LINE,
    "LlamaForCausalLM": {
        "grouped": BASE,
        "biased_tied": {**BASE, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True,
                        "tie_word_embeddings": True},
        "one_kv_head": {**BASE, "num_key_value_heads": 1},
        "wide_heads": {**BASE, "head_dim": 24, "hidden_act": "gelu"},
        "rope_linear": _rope("linear", factor=4.0),
        "rope_dynamic": {**_rope("dynamic", factor=2.0), "max_position_embeddings": 20},
        "rope_llama3": _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32),
        "rope_yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0),
        "rope_longrope": {**BASE, "max_position_embeddings": 80, "rope_parameters": _LONG},
    },
    "MistralForCausalLM": {
        "window": {**BASE, "sliding_window": 6},
        "no_window": {**BASE, "sliding_window": None, "head_dim": 16, "tie_word_embeddings": True},
    },
    "Qwen2ForCausalLM": {
        "full": {**BASE, "tie_word_embeddings": True},
        "upper_window": {**BASE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "layer_types": {**BASE, "use_sliding_window": True, "sliding_window": 5,
                        "layer_types": ["sliding_attention", "full_attention"]},
    },
    **EXPERTS,
    **LATENT,
    **OTHERS,
    **SPECIAL,
    **STATE_SPACE,
}  # fmt: skip


def has_experts(architecture: str, variant: str) -> bool:
    """Whether some layer of the tiny model is a mixture of experts."""
    return not {"num_local_experts", "num_experts", "n_routed_experts"}.isdisjoint(TINY[architecture][variant])


def tiny_cases() -> list[tuple[str, str]]:
    """Returns all (architecture, variant) pairs."""
    return [(architecture, variant) for architecture, variants in TINY.items() for variant in variants]


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-models-")


def _oracle_class(architecture: str) -> Any:
    import transformers

    if architecture in REFERENCES:
        return REFERENCES[architecture]
    return getattr(transformers, RENAMED[architecture].oracle if architecture in RENAMED else architecture)


@functools.cache
def hf_dir(architecture: str, variant: str) -> Path:
    """Returns a directory with config.json and model.safetensors in float32; the same one all session."""
    from safetensors.torch import load_file, save_file

    source = _oracle_dir(architecture, variant)
    if architecture not in RENAMED:
        return source
    renamed, directory = RENAMED[architecture], source.with_name(f"{source.name}-renamed")
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    save_file(renamed.tensors(config, load_file(source / "model.safetensors")), directory / "model.safetensors")
    config = {**renamed.config(config), "architectures": [architecture]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@functools.cache
def _oracle_dir(architecture: str, variant: str) -> Path:
    """Returns the directory as transformers saves it."""
    import torch

    model_class = _oracle_class(architecture)
    config = model_class.config_class(**TINY[architecture][variant])
    directory = Path(_root().name) / f"{architecture}-{variant}"
    torch_state = torch.get_rng_state()
    model = model_class(config)
    torch.set_rng_state(torch_state)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{architecture}/{variant}".encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                offset = architecture in NORMS_AROUND_ZERO and not name.endswith("linear_attn.norm.weight")
                around_zero = name.endswith("bias") or offset
                parameter.copy_(0.1 * noise + (0.0 if around_zero else 1.0))
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@functools.cache
def hf_model(architecture: str, variant: str) -> Any:
    """Returns transformers' own float32 model of `hf_dir`: the oracle."""
    import torch

    directory = _oracle_dir(architecture, variant)
    kernel = "sdpa" if architecture in EAGER_IS_WRONG else "eager"
    model = _oracle_class(architecture).from_pretrained(directory, dtype=torch.float32, attn_implementation=kernel)
    return model.eval()


def weight_spellings(architecture: str, variant: str) -> list[dict[str, Any]]:
    """Returns the weights as transformers holds them in memory and, where the output layer is tied, without it.

    Those of a renamed architecture are in its published form.
    """
    oracle = hf_model(architecture, variant)
    sources = [oracle.state_dict()]
    if oracle.config.tie_word_embeddings:
        sources.append({name: tensor.contiguous() for name, tensor in oracle.base_model.state_dict().items()})
    if architecture not in RENAMED:
        return sources
    config = json.loads((_oracle_dir(architecture, variant) / "config.json").read_text())
    return [RENAMED[architecture].tensors(config, tensors) for tensors in sources]


def write_config(directory: Path, **changes: Any) -> Path:
    """Writes a config.json of the grouped tiny Llama with ``changes`` (None deletes a key); returns the directory."""
    data: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **BASE}
    data.update(changes)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return directory
