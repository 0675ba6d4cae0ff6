"""Vocabulary files of GPT-2: ``vocab.json`` and ``merges.txt``, byte-level BPE read by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamella_core.errors import ConfigError


class ByteLevelVocabulary:
    """Byte-level BPE with GPT-2's word pattern and its letters for bytes."""

    def __init__(self, directory: Path, *, add_prefix_space: bool = False) -> None:
        """Reads a vocabulary.

        Raises:
            ConfigError: the files are damaged.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        try:
            model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError(f"vocab.json and merges.txt in {directory} are no vocabulary: {error}") from error
        self._backend = Tokenizer(model)
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        self._backend.decoder = decoders.ByteLevel()
        self.size = max(self._backend.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        return (self._backend.id_to_token(token_id) if token_id >= 0 else None) or ""

    def id_of(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)
