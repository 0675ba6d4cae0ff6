"""Qwen2.5-Math's reward models: Qwen2 under two linear layers, written over transformers' decoder.

Only the decoder is transformers'; the head is from the model cards (RM: one score; PRM: two per token).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class RewardReference(nn.Module):
    """Scores [T, labels] of all tokens of one text."""

    def __init__(self, config: Any, num_labels: int) -> None:
        from transformers import Qwen2Model

        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        wide = config.hidden_size
        self.score = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, num_labels))

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.model(ids).last_hidden_state)[0]
