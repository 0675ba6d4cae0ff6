"""Configurations of state-space models: the authors' own files, bounds of step lengths, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.tiny_models import hf_dir, hf_model

from lamella_core import AutoConfig, AutoModelForCausalLM
from lamella_core.errors import ConfigError

MAMBA = ("MambaForCausalLM", "odd_state")
QWEN3_NEXT = ("Qwen3NextForCausalLM", "attention_last")
JAMBA = ("JambaForCausalLM", "odd_sizes")
MAMBA2 = ("Mamba2ForCausalLM", "one_group_tied")


def original(case: tuple[str, str], directory: Path, **changes: Any) -> Path:
    """Writes a tiny model as mamba_ssm does: other names, a .bin file, the vocabulary padded by whoever reads it."""
    source = hf_dir(*case)
    config = json.loads((source / "config.json").read_text())
    names = {"expand": "expand", "conv_kernel": "d_conv", "state_size": "d_state"}
    if case is MAMBA:
        inner = {"dt_rank": config["time_step_rank"]}
    else:
        inner = {"layer": "Mamba2", "headdim": config["head_dim"], "conv_bias": config["use_conv_bias"]}
    inner |= {new: config[old] for old, new in names.items()}
    data = {
        "d_model": config["hidden_size"], "n_layer": config["num_hidden_layers"], "vocab_size": 129,
        "ssm_cfg": inner, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 131, "tie_embeddings": True, "attn_layer_idx": [], "attn_cfg": {},
        "d_intermediate": 0, **changes,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(data))
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("backbone.embeddings.", "backbone.embedding."): t for name, t in tensors.items()}
    renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]
    torch.save(renamed, directory / "pytorch_model.bin")
    return directory


@pytest.mark.parametrize("case", [MAMBA, MAMBA2], ids=lambda case: case[0])
def test_the_authors_own_files_load(case, tmp_path):
    ours = AutoModelForCausalLM.from_hugging_face(original(case, tmp_path))
    same = AutoModelForCausalLM.from_hugging_face(hf_dir(*case))
    assert type(ours) is type(same) and ours.config.eos_token_ids == (0,)
    for name, parameter in same.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in same.named_parameters()}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (MAMBA, {"rms_norm": False}, "rms_norm is False"),
        (MAMBA2, {"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
        (MAMBA2, {"d_intermediate": 96}, "d_intermediate is 96"),
        (MAMBA2, {"ssm_cfg": {"layer": "Mamba3"}}, "names no architecture"),
        (MAMBA2, {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim is True"),
    ],
)
def test_what_is_refused(case, change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_hugging_face(original(case, tmp_path, **change))


def bounded(directory: Path, limit: Any) -> Path:
    source = hf_dir("Mamba2ForCausalLM", "grouped")
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "time_step_limit": limit}))
    (directory / "model.safetensors").symlink_to(source / "model.safetensors")
    return directory


def test_bounds_of_step_lengths_equal_transformers(tmp_path):
    model = AutoModelForCausalLM.from_hugging_face(bounded(tmp_path, [0.4, 0.8]))
    assert (model.config.dt_min, model.config.dt_max) == (0.4, 0.8)
    oracle = type(hf_model("Mamba2ForCausalLM", "grouped")).from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = list(range(3, 20))
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
        free = hf_model("Mamba2ForCausalLM", "grouped")(torch.tensor([ids])).logits[0]
    logits = forward_step(model, ReferenceCache(), {0: ids})[0]
    assert (logits - expected).abs().max() < 3e-5 < (free - expected).abs().max()


@pytest.mark.parametrize("limit", [[0.8, 0.4], [0.1], "x", [0.0, None], [-1.0, 1.0]])
def test_bounds_that_are_none(limit, tmp_path):
    with pytest.raises(ConfigError, match="time_step_limit is .*; it must be two numbers"):
        AutoConfig.from_hugging_face(bounded(tmp_path, limit))


def test_layers_of_unknown_kinds_are_named(tmp_path):
    source = hf_dir("NemotronHForCausalLM", "all_kinds")
    config = json.loads((source / "config.json").read_text())
    del config["layers_block_type"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "hybrid_override_pattern": "M-*X"}))
    with pytest.raises(ConfigError, match=r"a layer is of kind 'X'; .* supports linear_attention \(M\)"):
        AutoConfig.from_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hybrid_override_pattern": "M-*M"}))
    assert AutoConfig.from_hugging_face(tmp_path).block_types == AutoConfig.from_hugging_face(source).block_types


def changed(case: tuple[str, str], directory: Path, drop: str, **changes: Any) -> Path:
    """Writes a tiny model's config.json without the key ``drop`` and with others."""
    config = json.loads((hf_dir(*case) / "config.json").read_text())
    del config[drop]
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def test_qwen3_next_as_published(tmp_path):
    """An interval instead of a list of layers, rope by the older keys, and layers that guess further tokens."""
    rope = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    source = changed(QWEN3_NEXT, tmp_path, "layer_types", full_attention_interval=2, **rope)
    tensors = load_file(hf_dir(*QWEN3_NEXT) / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    ours, same = (AutoModelForCausalLM.from_hugging_face(path) for path in (source, hf_dir(*QWEN3_NEXT)))
    assert ours.config == same.config and ours.config.attention_layers == (1,) and ours.config.rope.rotary_dim == 4
    for name, parameter in same.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name


@pytest.mark.parametrize(
    ("case", "drop", "change", "message"),
    [
        (QWEN3_NEXT, "layer_types", {"full_attention_interval": 1}, "every layer is full_attention"),
        (QWEN3_NEXT, "layer_types", {"linear_num_key_heads": 3}, "is not a multiple of linear_num_key_heads"),
        (QWEN3_NEXT, "dtype", {"layer_types": ["mamba"]}, "it needs linear_attention or full_attention"),
        (JAMBA, "dtype", {"attn_layer_offset": 3}, "must be smaller than attn_layer_period"),
        (JAMBA, "dtype", {"attn_layer_period": 1, "attn_layer_offset": 0}, "Jamba has Mamba layers too"),
        (("NemotronHForCausalLM", "experts"), "dtype", {"n_shared_experts": 2}, "n_shared_experts is 2"),
    ],
)
def test_hybrids_that_are_refused(case, drop, change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_hugging_face(changed(case, tmp_path, drop, **change))
