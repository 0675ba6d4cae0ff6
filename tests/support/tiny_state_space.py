"""Tiny configurations of state-space models and their hybrids: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

_MAMBA = {name: BASE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id",
                                        "eos_token_id")}  # fmt: skip
_MAMBA["state_size"] = 8
_MAMBA2 = {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}

STATE_SPACE: dict[str, dict[str, dict[str, Any]]] = {
    "MambaForCausalLM": {
        "tied": _MAMBA,
        "biased_untied": {**_MAMBA, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        "odd_state": {**_MAMBA, "state_size": 5, "conv_kernel": 3, "time_step_rank": 3, "expand": 3},
    },
    "FalconMambaForCausalLM": {
        "tied": _MAMBA,
        "biased_untied": {**_MAMBA, "use_bias": True, "tie_word_embeddings": False, "mixer_rms_eps": 0.01,
                          "state_size": 6},
        "odd_state": {**_MAMBA, "state_size": 17, "conv_kernel": 2, "time_step_rank": 7},
    },
    "Mamba2ForCausalLM": {
        "grouped": _MAMBA2,
        "one_group_tied": {**_MAMBA2, "n_groups": 1, "tie_word_embeddings": True, "use_conv_bias": False},
        "biased_odd_state": {**_MAMBA2, "n_groups": 4, "use_bias": True, "state_size": 19, "conv_kernel": 3,
                             "head_dim": 24, "expand": 6},
    },
}  # fmt: skip
