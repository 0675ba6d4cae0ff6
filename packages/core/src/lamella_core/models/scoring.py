"""Decoders with a head that scores: sequence classification, reward and process-reward models.

The layers are those of the language model; the head reads the last token (classification, reward: Yang et al. 2024,
"Qwen2.5-Math"), or every token (process reward: Zhang et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.hf_config import HfConfig
from lamella_core.layers.embedding import VocabMatrix
from lamella_core.layers.score_head import ScoreHead
from lamella_core.models._rules import module_rules
from lamella_core.models._scoring import REGRESSION, SINGLE_LABEL, scoring_fields
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM
from lamella_core.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from lamella_core.models.registry import register

_SCORE_RULES = (WeightRule("score.weight", "lm_head.out.weight"),)
_REWARD_RULES = tuple(module_rules({"score.0": "lm_head.dense", "score.2": "lm_head.out"}))


@dataclass(frozen=True, kw_only=True)
class LlamaScoringConfig(LlamaConfig):
    """Llama's fields, and what is scored."""

    labels: tuple[str, ...] = ()
    problem_type: str = SINGLE_LABEL

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        return {**LlamaConfig.from_hf(hf), "tie_word_embeddings": False, **scoring_fields(hf)}


@dataclass(frozen=True, kw_only=True)
class Qwen2ScoringConfig(Qwen2Config):
    """Qwen2's fields, and what is scored."""

    labels: tuple[str, ...] = ()
    problem_type: str = SINGLE_LABEL

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        return {**Qwen2Config.from_hf(hf), "tie_word_embeddings": False, **scoring_fields(hf)}


@dataclass(frozen=True, kw_only=True)
class Qwen2RewardConfig(Qwen2ScoringConfig):
    """A single score, whatever the file says of labels."""

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        return {**super().from_hf(hf), "labels": ["reward"], "problem_type": REGRESSION}


@dataclass(frozen=True, kw_only=True)
class Qwen2ProcessRewardConfig(Qwen2ScoringConfig):
    """Two scores per step of a solution, wrong and right, whatever the file says of labels."""

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        return {**super().from_hf(hf), "labels": ["wrong", "right"], "problem_type": SINGLE_LABEL}


@register("LlamaForSequenceClassification")
class LlamaForSequenceClassification(LlamaForCausalLM):
    """Scores of a text's last token."""

    config: LlamaScoringConfig
    config_class = LlamaScoringConfig
    task = "score"
    pooling = "last"
    WEIGHTS = (*LlamaForCausalLM.WEIGHTS, *_SCORE_RULES)

    def make_head(self, tied: VocabMatrix | None) -> nn.Module:
        return ScoreHead(self.config, len(self.config.labels), bias=False)


@register("Qwen2ForSequenceClassification")
class Qwen2ForSequenceClassification(Qwen2ForCausalLM):
    """Scores of a text's last token."""

    config: Qwen2ScoringConfig
    config_class = Qwen2ScoringConfig
    task = "score"
    pooling = "last"
    WEIGHTS = (*Qwen2ForCausalLM.WEIGHTS, *_SCORE_RULES)

    def make_head(self, tied: VocabMatrix | None) -> nn.Module:
        return ScoreHead(self.config, len(self.config.labels), bias=False)


@register("Qwen2ForRewardModel")
class Qwen2ForRewardModel(Qwen2ForCausalLM):
    """One score of a text's last token, by two layers."""

    config: Qwen2RewardConfig
    config_class = Qwen2RewardConfig
    task = "score"
    pooling = "last"
    WEIGHTS = (*Qwen2ForCausalLM.WEIGHTS, *_REWARD_RULES)

    def make_head(self, tied: VocabMatrix | None) -> nn.Module:
        return ScoreHead(self.config, len(self.config.labels), activation="relu", bias=True)


@register("Qwen2ForProcessRewardModel")
class Qwen2ForProcessRewardModel(Qwen2ForRewardModel):
    """Two scores of each token; those of a step's last token say whether the step is right."""

    config: Qwen2ProcessRewardConfig  # type: ignore[assignment]
    config_class = Qwen2ProcessRewardConfig  # type: ignore[assignment]
    pooling = "tokens"
