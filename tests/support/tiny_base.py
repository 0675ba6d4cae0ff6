"""What the tiny configurations of Llama-like architectures have in common: see `tests.support.tiny_models`."""

from __future__ import annotations

BASE = {
    "vocab_size": 131,  # odd: padded when split over two ranks
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
