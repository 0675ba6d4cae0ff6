"""Tiny random Llama models with real tokenizers, as Hugging Face directories: byte-level BPE and byte fallback."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = (
    "Once upon a time there was a small red fox. The fox lived in the old forest near the river. "
    'Every morning she ran to the water, drank, and looked at the sky. "What a fine day!" she said. '
    "The naïve owl answered: no, it will rain – 3 drops, 14 drops, 159 drops. It's late; they'll see. "
) * 4
SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="text-models-")


def byte_level_tokenizer() -> Any:
    """Returns a `transformers` tokenizer: byte-level BPE, bos in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def byte_fallback_backend() -> Any:
    """Returns a `tokenizers` tokenizer shaped like Llama 2's: "▁" for spaces, one token per byte as fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "▁the", "▁fox", "fox", "▁a", "a", "b", "c", "o", "x", "é", "▁▁", ".", ","]
    vocab = {piece: i for i, piece in enumerate(pieces + words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return backend


@functools.cache
def text_model_dir() -> Path:
    """Returns a directory with a tiny random Llama (float32) and the byte-level tokenizer; the same one all session."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = Path(_root().name) / "llama"
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 1.5 * parameter.shape[-1] ** -0.5)
    torch.set_rng_state(state)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def live_blocks(llm: Any) -> int:
    """Returns the KV blocks that are live once the engine has recorded the iteration of what was just answered."""
    deadline = time.monotonic() + 5
    while llm.get_stats()[-1].num_live_blocks and time.monotonic() < deadline:
        time.sleep(0.005)
    return llm.get_stats()[-1].num_live_blocks
