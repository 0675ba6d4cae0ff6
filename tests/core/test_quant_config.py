"""QuantConfig: what it accepts, refuses and writes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lamella_core.errors import ConfigError
from lamella_core.quantization.config import QuantAlgo, QuantConfig


def test_names_in_any_case_survive_json() -> None:
    config = QuantConfig("w4a16_awq", kv_cache_quant_algo=QuantAlgo.FP8, exclude_modules=["lm_head"])
    assert config.quant_algo is QuantAlgo.W4A16_AWQ and config.exclude_modules == ("lm_head",)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_no_quant_quantizes_nothing() -> None:
    assert QuantConfig("NO_QUANT") == QuantConfig() and not QuantConfig().is_quantized


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_algo": "FP9"}, "quant_algo is 'FP9'.*did you mean 'FP8'"),
        ({"group_size": 0}, "group_size is 0; it must be an integer of at least 1"),
        ({"group_size": "64"}, "group_size is '64'; it must be an integer"),
        ({"has_zero_point": "yes"}, "has_zero_point is 'yes'; it must be true or false"),
        ({"exclude_modules": "lm_head"}, "exclude_modules is 'lm_head'; it must be a list"),
        ({"exclude_modules": [3]}, "exclude_modules is .3.; it must be a list"),
    ],
)
def test_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**fields)
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_dict(fields)


def test_unknown_fields() -> None:
    with pytest.raises(ConfigError, match="no field 'group'; known: quant_algo"):
        QuantConfig.from_dict({"group": 1})
