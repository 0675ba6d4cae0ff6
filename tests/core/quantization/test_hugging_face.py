"""How directories say that their weights are quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_models import write_config

from lamella_core import AutoConfig, AutoModelForCausalLM, ConfigError, QuantAlgo, QuantConfig

FLOAT8 = {"type": "float", "num_bits": 8}
STATIC = QuantConfig("FP8", exclude_modules=("lm_head",), activation_scheme="static")


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    group = {"weights": {**FLOAT8, **weights}, "input_activations": inputs and {**FLOAT8, **inputs}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **fields}


SPELLINGS = {
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
         "kv_cache_scheme": {**FLOAT8, "dynamic": False}},
        QuantConfig("FP8", "FP8", exclude_modules=("lm_head",), activation_scheme="static"),
    ),
    "modelopt_nested": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        STATIC,
    ),
    "compressed_static": (compressed({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}), STATIC),
    "compressed_dynamic": (
        compressed({"strategy": "tensor"}, {"strategy": "token", "dynamic": True}, kv_cache_scheme=FLOAT8),
        QuantConfig("FP8", "FP8", exclude_modules=("lm_head",), activation_scheme="dynamic"),
    ),
    "compressed_channel": (
        compressed({"strategy": "channel"}, {"strategy": "token", "dynamic": True}, ignore=["re:.*lm_head"]),
        QuantConfig("FP8_PER_CHANNEL_PER_TOKEN", exclude_modules=("*lm_head*",), activation_scheme="dynamic"),
    ),
    "fp8_static": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, STATIC,
    ),
    "fp8_dynamic": ({"quant_method": "fp8"}, QuantConfig("FP8", activation_scheme="dynamic")),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str, tmp_path: Path) -> None:
    fields, expected = SPELLINGS[spelling]
    config = AutoConfig.from_hugging_face(write_config(tmp_path, quantization_config=fields))
    assert config.quantization == expected
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("spelling", ["modelopt_nested", "compressed_static", "fp8_static"])
def test_weights_of_every_spelling_load_alike(spelling: str, write: Callable[..., Path], modelopt_dir: Path) -> None:
    model = AutoModelForCausalLM.from_hugging_face(write(kv_cache=False, quant_config=SPELLINGS[spelling][0]))
    own = AutoModelForCausalLM.from_hugging_face(modelopt_dir)
    for name, parameter in model.named_parameters():
        assert parameter.equal(own.get_parameter(name)), name


def test_a_file_of_its_own_counts_first(tmp_path: Path) -> None:
    directory = write_config(tmp_path, quantization_config=SPELLINGS["modelopt"][0])
    content = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "*.0.mlp*"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    assert AutoConfig.from_hugging_face(directory).quantization.exclude_modules == ("lm_head", "*.0.mlp*")
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}')
    with pytest.raises(ConfigError, match=r"says FP8 and hf_quant_config.json beside it FP8_PER_CHANNEL_PER_TOKEN"):
        AutoConfig.from_hugging_face(directory)


def test_what_is_not_quantized(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert AutoConfig.from_hugging_face(write_config(tmp_path)).quantization == QuantConfig()
    asked = QuantConfig("FP8", "FP8")
    assert AutoConfig.from_hugging_face(tmp_path, quant_config=asked).quantization == asked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq', which cannot be read; readable: modelopt"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized to NVFP4, which cannot be read"),
        ({"quant_method": "modelopt", "quant_algo": "FP9"}, "quant_algo is 'FP9'.*use the unquantized model"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "algo is NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": "lm_head"}, "exclude_modules is 'lm_head'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]; it must be two"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size is '128'"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme is 'none'"),
        (compressed({"strategy": "block"}, {"strategy": "token", "dynamic": True}), "'block'.*cannot be read"),
        (compressed({"strategy": "tensor"}, None), "input_activations is None; it must be an object"),
        (compressed({"strategy": "channel", "num_bits": 4}, {"strategy": "token", "dynamic": True}), "4, 'channel'"),
        (compressed({"strategy": "tensor"}, {"strategy": "tensor"}, ignore=["re:(a+)+$"]), "regular expression"),
        (compressed({"strategy": "tensor"}, {"strategy": "tensor"}, kv_cache_scheme={"num_bits": 4}), "kv_cache"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, "2 groups"),
        ([1], r"quantization_config is \[1\]; it must be an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(fields: Any, message: str, tmp_path: Path) -> None:
    directory = write_config(tmp_path, quantization_config=fields)
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_hugging_face(directory)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (QuantConfig("FP8_PER_CHANNEL_PER_TOKEN"), "quant_algo"),
        (QuantConfig("W4A16_AWQ"), "quant_algo"),
        (QuantConfig("FP8", exclude_modules=["*.mlp.*"]), "exclude_modules"),
    ],
)
def test_contradictions(asked: QuantConfig, field: str, modelopt_dir: Path) -> None:
    for read in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(
            ConfigError, match=rf"quant_config.{field} is .* are quantized with .*leave quant_config out"
        ):
            read.from_hugging_face(modelopt_dir, quant_config=asked)


@pytest.mark.parametrize(
    "asked", [QuantConfig(), QuantConfig("FP8"), QuantConfig("FP8", "FP8", exclude_modules=["lm_head"])]
)
def test_what_agrees(asked: QuantConfig, modelopt_dir: Path) -> None:
    config = AutoConfig.from_hugging_face(modelopt_dir, quant_config=asked)
    assert config.quantization == QuantConfig("FP8", "FP8", exclude_modules=("lm_head",), activation_scheme="static")


def test_a_float8_cache_may_join_quantized_weights(write: Callable[..., Path]) -> None:
    asked = QuantConfig(kv_cache_quant_algo=QuantAlgo.FP8)
    model = AutoModelForCausalLM.from_hugging_face(write(kv_cache=False), quant_config=asked)
    assert model.config.quantization.quant_algo is model.config.quantization.kv_cache_quant_algo is QuantAlgo.FP8
    assert model.get_parameter("layers.0.attention.kv_scales").tolist() == [1.0, 1.0]
