"""Vocabulary files of `sentencepiece`, usually ``tokenizer.model``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamella.tokenizers.vocabulary import needs_library
from lamella_core.errors import ConfigError


class SentencePieceVocabulary:
    """Pieces with "▁" for spaces. Whether each text gets a space in front, and byte tokens, is the file's choice."""

    def __init__(self, path: Path, *, additions: bytes = b"") -> None:
        """Reads a vocabulary.

        Args:
            path: the file, a protocol buffer of type ModelProto.
            additions: encoded fields of that type, added to those of the file.

        Raises:
            ConfigError: sentencepiece is not installed; the file is no vocabulary.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise needs_library("sentencepiece", path) from error
        content = path.read_bytes()
        try:
            if not content:
                raise RuntimeError("the file is empty")
            self._backend = SentencePieceProcessor(model_proto=content + additions)
        except RuntimeError as error:
            raise ConfigError(f"{path} is no sentencepiece vocabulary ({error}); download it again") from error
        self.size: int = self._backend.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([i for i in ids if 0 <= i < self.size])

    def piece(self, token_id: int) -> str:
        return self._backend.id_to_piece(token_id) if 0 <= token_id < self.size else ""

    def id_of(self, piece: str) -> int | None:
        token_id = self._backend.piece_to_id(piece)
        return token_id if self._backend.id_to_piece(token_id) == piece else None
