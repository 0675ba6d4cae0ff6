"""BuildConfig: checked at construction, resolved once for a model, JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lamella_core.auto import AutoConfig
from lamella_core.config import ModelConfig
from lamella_core.engine import BuildConfig
from lamella_core.errors import ConfigError


@pytest.fixture
def model() -> ModelConfig:
    from tests.support.tiny_models import hf_dir

    return AutoConfig.from_hugging_face(hf_dir("LlamaForCausalLM", "grouped"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batchsize": 4}, "no field 'max_batchsize'; did you mean 'max_batch_size'"),
        ({"zzz": 4}, "no field 'zzz'; known: max_batch_size"),
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be an integer of at least 1"),
        ({"max_batch_size": True}, "max_batch_size is True"),
        ({"max_num_tokens": 2.5}, "max_num_tokens is 2.5"),
        ({"max_num_tokens": "8"}, "max_num_tokens is '8'"),
        ({"max_seq_len": 1}, "max_seq_len is 1; it must be an integer of at least 2"),
        ({"max_input_len": 0}, "max_input_len is 0"),
        ({"max_beam_width": -1}, "max_beam_width is -1"),
        ({"kv_cache_type": "pagd"}, "allowed: paged, continuous, disabled; did you mean 'paged'"),
        ({"kernel_selection": "fast"}, "allowed: timed, default"),
        ({"tokens_per_block": 24}, "power of two"),
        ({"max_beam_width": 8, "max_num_tokens": 4}, "max_beam_width 8 exceeds max_num_tokens 4"),
    ],
)
def test_bad_values_say_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**fields)


def test_limits_are_derived_from_the_model(model: ModelConfig) -> None:
    resolved = BuildConfig().resolved(model)
    assert (resolved.max_seq_len, resolved.max_input_len) == (64, 63)
    assert resolved.opt_num_tokens == 64 and resolved.dtype == "float32"
    assert resolved.resolved(model) == resolved
    given = BuildConfig(max_seq_len=32, max_input_len=8, opt_num_tokens=5, dtype="bf16").resolved(model)
    assert (given.max_seq_len, given.max_input_len, given.opt_num_tokens, given.dtype) == (32, 8, 5, "bfloat16")
    assert BuildConfig(max_batch_size=4, max_beam_width=3, max_num_tokens=8).resolved(model).opt_num_tokens == 8


def test_dynamic_rope_reaches_further_when_asked() -> None:
    from tests.support.tiny_models import hf_dir

    model = AutoConfig.from_hugging_face(hf_dir("LlamaForCausalLM", "rope_dynamic"))
    assert BuildConfig().resolved(model).max_seq_len == 20
    assert BuildConfig(max_seq_len=40).resolved(model).max_seq_len == 40
    with pytest.raises(ConfigError, match="max_seq_len 41 exceeds the model's 40 positions"):
        BuildConfig(max_seq_len=41).resolved(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_seq_len": 65}, "max_seq_len 65 exceeds the model's 64 positions"),
        ({"max_seq_len": 8, "max_input_len": 9}, "max_input_len 9 exceeds max_seq_len 8"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_limits_that_the_model_rules_out(model: ModelConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**fields).resolved(model)


def test_json_and_back(model: ModelConfig) -> None:
    config = BuildConfig(max_batch_size=3, kv_cache_type="Continuous").resolved(model)
    assert config.kv_cache_type == "continuous"
    assert BuildConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="no field"):
        BuildConfig.from_dict({"max_batch": 3})
