"""Llama 3.2 Vision (Grattafiori et al. 2024) for text alone: Llama whose cross-attention layers do nothing.

Those layers attend over an image; without one they are skipped, feed-forward included, and need no weights. Only the
embedding has rows for the image token, whose id no prompt may contain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from lamella_core.checks import check_integer
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.decoder import SkippedLayer
from lamella_core.layers.embedding import VocabParallelEmbedding
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM
from lamella_core.models.registry import register

_NUM_IMAGE_ROWS = 8  # of the embedding, after the vocabulary


@dataclass(frozen=True, kw_only=True)
class MllamaConfig(LlamaConfig):
    """Llama's fields, and which layers attend over images."""

    cross_attention_layers: tuple[int, ...] = ()

    hf_model_types: ClassVar[tuple[str, ...]] = ("mllama", "mllama_text_model")

    def __post_init__(self) -> None:
        super().__post_init__()
        for index in self.cross_attention_layers:
            check_integer("an entry of cross_attention_layers", index, 0, self.num_hidden_layers - 1)
        if len(set(self.cross_attention_layers)) >= self.num_hidden_layers:
            raise ConfigError("cross_attention_layers names every layer; at least one must attend over text")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config: of the whole model, or of its decoder alone."""
        text = hf.nested("text_config") if hf.model_type == "mllama" else hf
        layers = text.get("cross_attention_layers", default=None)
        if not isinstance(layers, list):
            raise ConfigError(f"{text.where}: cross_attention_layers is {layers!r}; it must be a list of layer numbers")
        return {**LlamaConfig.from_hf(text), "cross_attention_layers": layers}


@register("MllamaForConditionalGeneration", "MllamaForCausalLM")
class MllamaForCausalLM(LlamaForCausalLM):
    """The decoder of Llama 3.2 Vision."""

    config: MllamaConfig
    config_class = MllamaConfig
    OUTER_PREFIX = "language_model."

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config)
        if self.embed_tokens is not None:
            self.embed_tokens = VocabParallelEmbedding(replace(config, vocab_size=config.vocab_size + _NUM_IMAGE_ROWS))

    def make_layer(self, index: int) -> nn.Module:
        return SkippedLayer() if index in self.config.cross_attention_layers else super().make_layer(index)

    def ignored_sources(self) -> Sequence[str]:
        skipped = (f"*model.layers.{index}.*" for index in self.config.cross_attention_layers)
        return (*self.IGNORED, "vision_model.*", "model.vision_model.*", "*multi_modal_projector.*", *skipped)
