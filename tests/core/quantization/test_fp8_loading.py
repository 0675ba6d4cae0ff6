"""Reading float8 weights: fused scales, what is excluded, and what a damaged checkpoint is answered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support.modelopt import edit_tensors, round8
from tests.support.tiny_models import hf_dir

from lamella_core import AutoModelForCausalLM, CheckpointError, ConfigError, QuantConfig

FLOAT8 = torch.float8_e4m3fn
ATTENTION = "model__layers__0__self_attn__"


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_hugging_face(directory, **options)


def test_equal_scales_leave_every_byte_alone(write: Callable[..., Path]) -> None:
    directory = write()
    scale = torch.tensor(0.01)
    edit_tensors(directory, **{f"{ATTENTION}{s}_proj__weight_scale": scale for s in "qkv"})
    tensors = load_file(directory / "model.safetensors")
    model = load(directory)
    fused = torch.cat([tensors[f"model.layers.0.self_attn.{s}_proj.weight"] for s in "qkv"])
    assert torch.equal(model.get_parameter("layers.0.attention.qkv_proj.weight"), fused)
    assert model.get_parameter("layers.0.attention.qkv_proj.weight_scale") == scale


def test_other_scales_are_brought_to_the_largest(write: Callable[..., Path]) -> None:
    directory = write()
    scales = {"q": torch.tensor(0.03), "k": torch.tensor([0.01]), "v": torch.tensor(0.02)}  # [] or [1]
    edit_tensors(directory, **{f"{ATTENTION}{s}_proj__weight_scale": scale for s, scale in scales.items()})
    edit_tensors(directory, **{f"{ATTENTION}k_proj__input_scale": torch.tensor([0.5])})
    tensors = load_file(directory / "model.safetensors")
    linear = load(directory).get_submodule("layers.0.attention.qkv_proj")
    assert linear.weight_scale == scales["q"] and linear.input_scale == 0.5
    for section, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
        values = tensors[f"model.layers.0.self_attn.{section}_proj.weight"].float()
        expected = round8(values * scales[section], scales["q"])
        assert torch.equal(linear.weight[rows], expected), section


def test_scales_of_keys_and_values(write: Callable[..., Path]) -> None:
    directory = write()
    tensors = load_file(directory / "model.safetensors")
    expected = torch.stack([tensors[f"model.layers.1.self_attn.{s}_proj.{s}_scale"] for s in "kv"])
    assert torch.equal(load(directory).get_parameter("layers.1.attention.kv_scales"), expected)
    names = {f"model__layers__1__self_attn__{s}_proj__{s}_scale": None for s in "kv"}
    edit_tensors(directory, **names, model__layers__1__self_attn__v_scale=torch.tensor(3.0))
    assert load(directory).get_parameter("layers.1.attention.kv_scales").tolist() == [1.0, 3.0]


def test_float8_cache_beside_weights_without_scales() -> None:
    model = load(hf_dir("GPT2LMHeadModel", "tied"), quant_config=QuantConfig(kv_cache_quant_algo="FP8"))
    assert model.get_parameter("layers.0.attention.kv_scales").tolist() == [1.0, 1.0]
    assert model.get_parameter("layers.0.attention.qkv_proj.weight").dtype == torch.float32


def test_one_channel_scale_per_output(write: Callable[..., Path]) -> None:
    directory = write(per_channel=True)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(directory, **{f"{name}_scale".replace(".", "__"): tensors[f"{name}_scale"].bfloat16()[:, None]})
    linear = load(directory).get_submodule("layers.0.mlp.down_proj")
    assert torch.equal(linear.weight, tensors[name]) and linear.weight_scale.shape == (32,)
    assert torch.equal(linear.weight_scale, tensors[f"{name}_scale"].bfloat16().float())


@pytest.mark.parametrize(
    "exclude",
    [
        ["lm_head", "model.layers.0.mlp*"],
        ["model.layers.0.mlp"],
        ["*.0.mlp.*"],
        ["layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"],
    ],
)
def test_excluded_modules_keep_their_dtype(exclude: list[str]) -> None:
    config = QuantConfig("FP8", exclude_modules=exclude)
    model = load(hf_dir("LlamaForCausalLM", "grouped"), quant_config=config)
    plain = {name for name, p in model.named_parameters() if name.endswith("_proj.weight") and p.dtype != FLOAT8}
    assert plain == {"layers.0.mlp.gate_up_proj.weight", "layers.0.mlp.down_proj.weight"}
    assert model.config.quantization.exclude_modules == tuple(exclude)


def test_excluded_modules_of_a_checkpoint(write: Callable[..., Path]) -> None:
    excluded = [f"model.layers.0.self_attn.{s}_proj" for s in "qkv"]
    model = load(write(exclude=["lm_head", *excluded]))
    assert model.get_parameter("layers.0.attention.qkv_proj.weight").dtype == torch.float32
    assert model.get_parameter("layers.0.attention.o_proj.weight").dtype == FLOAT8
    assert model.get_submodule("layers.0.attention").input_scale is None


def test_experts_are_excluded_by_their_hub_names() -> None:
    config = QuantConfig("FP8", exclude_modules=["*block_sparse_moe.experts.*.w2"])
    model = load(hf_dir("MixtralForCausalLM", "top2"), quant_config=config)
    assert model.get_parameter("layers.0.mlp.experts.down_proj.weight").dtype == torch.float32
    assert model.get_parameter("layers.0.mlp.experts.gate_up_proj.weight").dtype == FLOAT8
    assert model.get_parameter("layers.0.mlp.router.gate.weight").dtype == torch.float32


def test_a_part_of_a_fused_projection_cannot_be_excluded() -> None:
    config = QuantConfig("FP8", exclude_modules=["*.q_proj"])
    with pytest.raises(ConfigError, match=r"excludes some of .*k_proj, .*q_proj, .*v_proj and not others.*all of them"):
        load(hf_dir("LlamaForCausalLM", "grouped"), quant_config=config)


def test_float8_weights_of_what_is_never_quantized_are_scaled_back(write: Callable[..., Path]) -> None:
    directory = write()
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    scale = head.abs().max() / 448
    edit_tensors(
        directory,
        lm_head__weight=round8(head, scale),
        lm_head__weight_scale=scale,
        lm_head__input_scale=torch.tensor(1.0),
    )
    model = load(directory, dtype="bfloat16")
    assert model.get_parameter("lm_head.weight").dtype == torch.bfloat16
    assert torch.equal(model.get_parameter("lm_head.weight"), (round8(head, scale).float() * scale).bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{ATTENTION}q_proj__weight_scale": None}, r"1 missing:\n  .*q_proj.weight_scale\n.*mean nothing without"),
        ({f"{ATTENTION}o_proj__input_scale": None}, r"1 missing:\n  .*o_proj.input_scale\n.*'dynamic'"),
        (
            {f"{ATTENTION}o_proj__weight": torch.ones(32, 32).to(torch.float8_e5m2)},
            r"o_proj.weight: dtype torch.float8_e5m2, the configuration needs torch.float8_e4m3fn",
        ),
        ({f"{ATTENTION}o_proj__weight": torch.ones(32, 31).to(FLOAT8)}, r"o_proj.weight: shape \[32, 31\]"),
        ({f"{ATTENTION}k_proj__weight": torch.ones(16, 32)}, r"qkv_proj.weight are float8 and others are not"),
        ({f"{ATTENTION}q_proj__weight_scale": torch.tensor(3)}, r"q_proj.weight_scale: dtype torch.int64"),
        ({f"{ATTENTION}q_proj__weight_scale": torch.ones(32)}, r"shape \[32\], .* needs \[\].*quant_algo"),
        ({f"{ATTENTION}q_proj__weight_scale": torch.tensor(-1.0)}, r"q_proj.weight_scale holds .* not a positive"),
        ({f"{ATTENTION}q_proj__input_scale": torch.tensor(0.0)}, r"q_proj.input_scale holds .* not a positive"),
        ({f"{ATTENTION}v_proj__v_scale": torch.tensor(float("nan"))}, r"v_proj.v_scale holds .* not a positive"),
        ({"model__layers__0__mlp__other__weight_scale": torch.tensor(1.0)}, r"1 unexpected:\n  .*other.weight_scale"),
    ],
)  # fmt: skip
def test_damaged_checkpoints(write: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    directory = write()
    edit_tensors(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_float8_weights_that_nothing_announces(write: Callable[..., Path]) -> None:
    directory = write()
    (directory / "hf_quant_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"q_proj.weight: dtype torch.float8_e4m3fn.*is a file missing"):
        load(directory)


def test_static_scales_cannot_be_had_from_wider_weights() -> None:
    with pytest.raises(CheckpointError, match=r"q_proj.input_scale(.|\n)*come from calibration"):
        load(hf_dir("LlamaForCausalLM", "grouped"), quant_config=QuantConfig("FP8", activation_scheme="static"))


def test_scales_of_a_cache_that_is_not_quantized_are_left(write: Callable[..., Path]) -> None:
    directory = write()
    path = directory / "hf_quant_config.json"
    content = json.loads(path.read_text())
    content["quantization"]["kv_cache_quant_algo"] = None
    path.write_text(json.dumps(content))
    assert not any("kv_scales" in name for name, _ in load(directory).named_parameters())
