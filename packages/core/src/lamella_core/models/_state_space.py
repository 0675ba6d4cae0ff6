"""What models made of state-space layers alone share: the names of their weights and of their config.json's fields."""

from __future__ import annotations

from typing import Any

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.models._rules import module_rules

# Nothing in a config.json says how long sequences may be: the state does not grow. The override
# ``max_position_embeddings`` names another limit.
DEFAULT_POSITIONS = 1 << 15


def mixer_rules(source: str = "backbone.layers.{i}.mixer", target: str = "layers.{i}.mixer") -> list[WeightRule]:
    """A mixer of either kind; biases where the model has them."""
    names = {name: name for name in ("in_proj", "x_proj", "out_proj")}
    return [
        *module_rules({**names, "conv1d": "conv"}, f"{source}.", f"{target}."),
        WeightRule(f"{source}.dt_proj.weight", f"{target}.dt_proj.weight"),
        WeightRule(f"{source}.dt_proj.bias", f"{target}.dt_bias"),
        WeightRule(f"{source}.dt_bias", f"{target}.dt_bias"),
        WeightRule(f"{source}.A_log", f"{target}.a_log"),
        WeightRule(f"{source}.D", f"{target}.d"),
        WeightRule(f"{source}.norm.weight", f"{target}.norm.weight"),
    ]


def backbone_rules() -> list[WeightRule]:
    """Embedding, norms and output layer of a model with the prefix "backbone."."""
    return [
        WeightRule("backbone.embeddings.weight", "embed_tokens.weight"),
        WeightRule("backbone.embedding.weight", "embed_tokens.weight"),
        WeightRule("backbone.norm_f.weight", "norm.weight"),
        WeightRule("lm_head.weight", "lm_head.weight"),
        WeightRule("backbone.layers.{i}.norm.weight", "layers.{i}.norm.weight"),
    ]


def pure_fields(hf: HfConfig) -> dict[str, Any]:
    """Returns the `ModelConfig` fields of a model without attention, sizes of its layers apart.

    The authors' own files (of mamba_ssm) have other names than transformers': d_model, n_layer, ssm_cfg.

    Raises:
        ConfigError: a computation that is not implemented.
    """
    vocab, step = hf.integer("vocab_size"), hf.integer("pad_vocab_size_multiple", default=1)
    is_original = hf.get("ssm_cfg", default=None) is not None
    hf.require("rms_norm", (True,), True)
    hf.require("hidden_act", ("silu", "swish"), "silu")
    hf.require("d_intermediate", (0, None), 0)
    hf.require("attn_layer_idx", ([], None), None)
    tokens = hf.token_ids()
    if is_original and not tokens["eos_token_ids"]:
        tokens["eos_token_ids"] = (0,)  # GPT-NeoX's <|endoftext|>, with which all of them were trained
    return {
        "vocab_size": -(-vocab // step) * step,
        "hidden_size": hf.integer("hidden_size", "d_model"),
        "num_hidden_layers": hf.integer("num_hidden_layers", "n_layer"),
        "max_position_embeddings": hf.integer("max_position_embeddings", default=DEFAULT_POSITIONS),
        "norm_eps": hf.get("layer_norm_epsilon", default=1e-5),
        **tokens,
    }


def time_step_limit(hf: HfConfig) -> dict[str, Any]:
    """Returns ``dt_min`` and ``dt_max`` from a ``time_step_limit`` [least, most], where most may be infinite.

    Raises:
        ConfigError: it is something else.
    """
    given = hf.get("time_step_limit", "mamba_dt_limit", "dt_limit", default=None)
    if given is None:
        return {"dt_min": 0.0, "dt_max": None}
    if isinstance(given, (list, tuple)) and len(given) == 2:
        least, most = (_number(end) for end in given)
        if least is not None and most is not None and 0 <= least < most:
            return {"dt_min": least, "dt_max": None if most == float("inf") else most}
    raise ConfigError(f"{hf.where}: time_step_limit is {given!r}; it must be two numbers, the first the smaller")


def _number(value: object) -> float | None:
    """Returns a number, also one written as transformers writes those that JSON has not: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        value = value.get("__float__")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
