"""SparseConfig: fields that Qwen's mixtures of experts share, and which layers of a config.json have experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamella_core.checks import check_integer
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig


@dataclass(frozen=True, kw_only=True)
class SparseConfig(ModelConfig):
    """``intermediate_size`` is that of the layers without experts."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # of one expert
    norm_topk_prob: bool = False  # whether the weights of a token's experts are rescaled to sum to one
    dense_layers: tuple[int, ...] = ()  # those with a plain gated MLP

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in self.dense_layers:
            check_integer("an entry of dense_layers", layer, 0, self.num_hidden_layers - 1)

    @staticmethod
    def sparse_fields(hf: HfConfig, num_layers: int) -> dict[str, Any]:
        """Returns this class's own fields read from a Hugging Face config."""
        step = hf.integer("decoder_sparse_step", default=1)  # layers step - 1, 2 step - 1, ... have experts
        dense = hf.get("mlp_only_layers", default=None) or []
        if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
            raise ConfigError(f"{hf.where}: mlp_only_layers is {dense!r}; it must be a list of layer numbers")
        return {
            "num_experts": hf.integer("num_experts", "num_local_experts"),
            "num_experts_per_tok": hf.integer("num_experts_per_tok"),
            "moe_intermediate_size": hf.integer("moe_intermediate_size"),
            "norm_topk_prob": hf.flag("norm_topk_prob", default=False),
            "dense_layers": [i for i in range(num_layers) if i in dense or (i + 1) % step],
        }
