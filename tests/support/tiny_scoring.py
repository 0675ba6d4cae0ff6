"""Tiny models that score texts, with transformers or a reference as the oracle."""

from __future__ import annotations

import functools
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from tests.support.tiny_base import BASE

_BERT = {"vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 40}  # fmt: skip
_NAMES = {0: "bad", 1: "fair", 2: "good"}

TINY_SCORING: dict[str, dict[str, dict[str, Any]]] = {
    "BertForSequenceClassification": {
        "three_labels": {**_BERT, "id2label": _NAMES},
        "regression": {**_BERT, "num_labels": 1, "hidden_act": "relu", "layer_norm_eps": 1e-5},
        "several_labels": {**_BERT, "num_labels": 4, "problem_type": "multi_label_classification",
                           "hidden_act": "gelu_new", "type_vocab_size": 3},
    },
    "RobertaForSequenceClassification": {
        "two_labels": {**_BERT, "type_vocab_size": 1, "pad_token_id": 1},
        "three_labels": {**_BERT, "type_vocab_size": 1, "pad_token_id": 1, "id2label": _NAMES},
        "other_padding": {**_BERT, "type_vocab_size": 2, "pad_token_id": 6},
    },
    "XLMRobertaForSequenceClassification": {
        "two_labels": {**_BERT, "type_vocab_size": 1, "pad_token_id": 1, "num_attention_heads": 2},
    },
    "LlamaForSequenceClassification": {
        "three_labels": {**BASE, "id2label": _NAMES, "pad_token_id": 0},
        "tied": {**BASE, "num_labels": 2, "tie_word_embeddings": True, "pad_token_id": 0},
        "one_kv_head": {**BASE, "num_labels": 1, "num_key_value_heads": 1, "pad_token_id": 0},
    },
    "Qwen2ForSequenceClassification": {
        "window": {**BASE, "num_labels": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
                   "pad_token_id": 0},
    },
    "Qwen2ForRewardModel": {"grouped": BASE, "tied": {**BASE, "tie_word_embeddings": True},
                            "all_heads": {**BASE, "num_key_value_heads": 4}},
    "Qwen2ForProcessRewardModel": {"grouped": BASE, "one_kv_head": {**BASE, "num_key_value_heads": 1},
                                   "all_heads": {**BASE, "num_key_value_heads": 4}},
}  # fmt: skip
_REWARD_LABELS = {"Qwen2ForRewardModel": 1, "Qwen2ForProcessRewardModel": 2}


def scoring_cases() -> list[tuple[str, str]]:
    """Returns all (architecture, variant) pairs."""
    return [(architecture, variant) for architecture, variants in TINY_SCORING.items() for variant in variants]


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-scoring-")


@functools.cache
def scoring_model(architecture: str, variant: str) -> tuple[Path, Any]:
    """Returns a directory in float32 and the oracle that wrote it."""
    import transformers
    from safetensors.torch import save_file
    from tests.references.reward import RewardReference

    values, directory = TINY_SCORING[architecture][variant], Path(_root().name) / f"{architecture}-{variant}"
    generator = torch.Generator().manual_seed(zlib.crc32(f"{architecture}/{variant}".encode()))
    labels = _REWARD_LABELS.get(architecture)
    if labels is None:
        model_class = getattr(transformers, architecture)
        model = model_class(model_class.config_class(**values))
    else:
        model = RewardReference(transformers.Qwen2Config(**values), labels)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(0.1 * noise + 1.0 if is_norm else 0.25 * noise)
    model.eval()
    if labels is None:
        model.save_pretrained(directory)
    else:
        directory.mkdir()
        config = {**model.config.to_dict(), "architectures": [architecture], "model_type": "qwen2"}
        (directory / "config.json").write_text(json.dumps(config))
        save_file(
            {name: tensor.clone() for name, tensor in model.state_dict().items()}, directory / "model.safetensors"
        )
    return directory, model


def oracle_scores(architecture: str, oracle: Any, ids: list[int], types: list[int] | None = None) -> torch.Tensor:
    """Returns what the oracle says of one text: [labels], or [T, labels] of a model that scores tokens."""
    with torch.no_grad():
        if architecture in _REWARD_LABELS:
            scores = oracle(torch.tensor([ids]))
            return scores if architecture == "Qwen2ForProcessRewardModel" else scores[-1]
        parts = {} if types is None else {"token_type_ids": torch.tensor([types])}
        return oracle(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **parts).logits[0]
