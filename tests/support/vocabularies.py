"""Tiny vocabulary files of the kinds that models come with: tiktoken ranks, sentencepiece models, GPT-2's two files."""

from __future__ import annotations

import base64
import functools
import io
import json
from pathlib import Path
from typing import Any

SENTENCES = (
    "Once upon a time there was a small red fox. The fox lived in the old forest near the river.",
    "Every morning she ran to the water, drank, and looked at the sky: 3 drops, 14 drops, 159 drops.",
    "你好，世界。狐狸住在森林里。问：你好吗？答：我很好。",
    "The naïve owl answered: no, it will rain. They'll see the philosophy of sop and eop.",
)


@functools.cache
def byte_level_bpe() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Returns vocabulary and merges of a byte-level BPE in GPT-2's letters, trained on `SENTENCES`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], tuple((first, second) for first, second in model["merges"])


@functools.cache
def tiktoken_ranks() -> dict[bytes, int]:
    """Returns the rank of each token's bytes: the 256 bytes, then what `byte_level_bpe` merged, in that order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in byte_level_bpe()[1]:
        ranks.setdefault(bytes(byte_of[letter] for letter in "".join(pair)), len(ranks))
    return ranks


def write_tiktoken(path: Path) -> None:
    """Writes `tiktoken_ranks` as tiktoken does."""
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in tiktoken_ranks().items()))


def write_byte_level(directory: Path) -> None:
    """Writes vocab.json and merges.txt."""
    vocab, merges = byte_level_bpe()
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


@functools.cache
def sentencepiece_model(
    *, user_defined: tuple[str, ...] = (), control: tuple[str, ...] = (), byte_fallback: bool = True, **options: Any
) -> bytes:
    """Returns a sentencepiece model trained on `SENTENCES`; it keeps blanks as they are."""
    from sentencepiece import SentencePieceTrainer

    content = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=content, vocab_size=460 if byte_fallback else 200,
        model_type="bpe", byte_fallback=byte_fallback, character_coverage=1.0, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=list(user_defined),
        control_symbols=list(control), num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    return content.getvalue()
