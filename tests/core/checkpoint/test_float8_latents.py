"""Published forms of float8 weights of models with latent attention: scales per block, tensor or row.

DeepSeek-V3 itself has scales per block of 128 x 128; here blocks are smaller, and divide no weight.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.tiny_models import hf_dir

from lamella_core import AutoConfig, AutoModelForCausalLM, CheckpointError, ConfigError, Mapping, QuantConfig
from lamella_core.checkpoint.block_scales import open_source

FLOAT8 = torch.float8_e4m3fn
BLOCK = (12, 7)
CASES = [("DeepseekV3ForCausalLM", "yarn_groups"), ("DeepseekV2ForCausalLM", "lite_yarn")]
FORMS = {
    "block": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
    "tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "row": {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"all": {
        "weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
        "input_activations": {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}}}},
}  # fmt: skip


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    kept = ("embed_tokens", "lm_head", "mlp.gate.")
    return tensor.dim() == 2 and not any(part in name for part in kept)


def quantized(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns float8 numbers, scales as they are stored, and what both stand for, in float64."""
    rows, columns = {"block": BLOCK, "tensor": weight.shape, "row": (1, weight.shape[1])}[form]
    count = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scales = torch.empty(count)
    for i in range(count[0]):
        for j in range(count[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scales[i, j] = part.abs().max() / 448.0
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
    stored = (weight / spread).to(FLOAT8)
    return stored, scales if form == "block" else scales.squeeze(), stored.double() * spread.double()


def write(directory: Path, case: tuple[str, str], form: str) -> tuple[Path, Path]:
    """Writes the case's weights in float8, and beside it what they stand for; returns both directories."""
    source, narrow, wide = hf_dir(*case), {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        narrow[name], wide[name] = tensor, tensor
        if is_quantized(name, tensor):
            suffix = "_scale_inv" if form == "block" else "_scale"
            narrow[name], narrow[name + suffix], exact = quantized(tensor, form)
            wide[name] = exact.float()
    config = json.loads((source / "config.json").read_text())
    for name, tensors, fields in (("narrow", narrow, {"quantization_config": FORMS[form]}), ("wide", wide, {})):
        (directory / name).mkdir(parents=True)
        save_file(tensors, directory / name / "model.safetensors")
        (directory / name / "config.json").write_text(json.dumps({**config, **fields}))
    return directory / "narrow", directory / "wide"


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_scales_per_block_are_applied_as_weights_are_read(case, tmp_path, caplog):
    narrow, wide = write(tmp_path, case, "block")
    with caplog.at_level("INFO"):
        model = AutoModelForCausalLM.from_hugging_face(narrow)
    assert not model.config.quantization.is_quantized and "per block of [12, 7]" in caplog.text
    expected = dict(AutoModelForCausalLM.from_hugging_face(wide).named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=2e-7, atol=0.0)


def test_ranks_read_their_parts_of_blocks(tmp_path):
    narrow, wide = write(tmp_path, CASES[0], "block")
    for rank in range(2):
        mapping = Mapping(world_size=2, rank=rank, tp_size=2, moe_ep_size=2)
        expected = dict(AutoModelForCausalLM.from_hugging_face(wide, mapping=mapping).named_parameters())
        for name, parameter in AutoModelForCausalLM.from_hugging_face(narrow, mapping=mapping).named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=2e-7, atol=0.0)


def test_scales_per_block_can_become_scales_per_row(tmp_path):
    narrow, wide = write(tmp_path, CASES[0], "block")
    asked = QuantConfig("FP8_PER_CHANNEL_PER_TOKEN")
    models = [AutoModelForCausalLM.from_hugging_face(d, quant_config=asked) for d in (narrow, wide)]
    ours, theirs = (dict(model.named_parameters()) for model in models)
    assert ours["layers.0.attention.qkv_proj.weight"].dtype == FLOAT8
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.float(), theirs[name].float(), rtol=0.13, atol=1e-6)


@pytest.mark.parametrize("form", ["tensor", "row"])
def test_other_scales_reach_the_absorbed_matrices(form, tmp_path):
    """They stay in the model's dtype; a head's matrices take the scales of their rows."""
    narrow, wide = write(tmp_path, CASES[0], form)
    model, expected = AutoModelForCausalLM.from_hugging_face(narrow), AutoModelForCausalLM.from_hugging_face(wide)
    for part in ("k_up", "v_up"):
        ours, theirs = (m.get_parameter(f"layers.1.attention.{part}.weight") for m in (model, expected))
        torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0.0)
    prompt = list(range(3, 20))
    logits, wanted = (forward_step(m, ReferenceCache(), {0: prompt})[0] for m in (model, expected))
    assert (logits - wanted).abs().mean() < 0.2
    for rank in range(2):
        mapping = Mapping(world_size=2, rank=rank, tp_size=2)
        shard = AutoModelForCausalLM.from_hugging_face(narrow, mapping=mapping)
        for name in ("layers.0.attention.k_up.weight", "layers.1.attention.v_up.weight"):
            assert torch.equal(shard.get_parameter(name), model.get_parameter(name)[2 * rank : 2 * rank + 2])


def change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def test_what_does_not_fit_is_refused(tmp_path):
    narrow, _ = write(tmp_path, CASES[0], "block")
    scales = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    stored = load_file(narrow / "model.safetensors")[scales]
    for tensor, message in (
        (stored[:-1].contiguous(), r"scales of shape .*blocks of \[12, 7\]"),
        (torch.full_like(stored, float("nan")), "not a positive number"),
        (None, "1 scales of float8 weights are missing"),
    ):
        change(narrow, scales, tensor) if scales in load_file(narrow / "model.safetensors") else None
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_hugging_face(narrow)
    config = json.loads((narrow / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128]
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="weight_block_size"):
        AutoConfig.from_hugging_face(narrow)


def test_parts_of_a_matrix(tmp_path):
    narrow, wide = write(tmp_path, CASES[0], "block")
    name = "model.layers.0.mlp.down_proj.weight"
    source, expected = open_source(narrow), load_file(wide / "model.safetensors")[name]
    assert source.dtype(name) == torch.float32 and f"{name}_scale_inv" not in source.names()
    assert torch.equal(source.read(name, (slice(5, 30), slice(3, 41))), expected[5:30, 3:41])
    out = torch.empty(38, 25, dtype=torch.bfloat16)
    source.copy(out, name, (slice(5, 30), slice(3, 41)), transpose=True)
    assert torch.equal(out, expected[5:30, 3:41].mT.bfloat16())
    with pytest.raises(CheckpointError, match="the model needs"):
        source.copy(out, name)
