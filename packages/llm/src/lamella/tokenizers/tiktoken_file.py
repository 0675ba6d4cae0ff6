"""Vocabulary files of `tiktoken`: one line per token, its bytes in base64 and its rank, which is its id."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lamella.tokenizers.vocabulary import needs_library
from lamella_core.errors import ConfigError


class TiktokenVocabulary:
    """Byte-level BPE by ranks, after a regular expression has cut the text into words."""

    def __init__(self, path: Path, pattern: str, *, normalization: Literal["NFC"] | None = None) -> None:
        """Reads a vocabulary.

        Args:
            path: the file.
            pattern: the regular expression, which no file holds.
            normalization: Unicode form that texts get first.

        Raises:
            ConfigError: tiktoken is not installed; the file is no vocabulary.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise needs_library("tiktoken", path) from error
        ranks = _read_ranks(path)
        self._normalization = normalization
        self._backend = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._bytes = {rank: token for token, rank in ranks.items()}
        self.size = max(self._bytes) + 1

    def encode(self, text: str) -> list[int]:
        if self._normalization is not None:
            text = unicodedata.normalize(self._normalization, text)
        return self._backend.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def piece(self, token_id: int) -> str:
        """Returns a token's text; bytes that are no character by themselves are shown as escapes."""
        return self._bytes.get(token_id, b"").decode("utf-8", errors="backslashreplace")

    def id_of(self, piece: str) -> int | None:
        try:
            return self._backend.encode_single_token(piece)
        except KeyError:
            return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Returns the rank of each token's bytes.

    Raises:
        ConfigError: a line is not base64 and a number; a byte has no token, so that some texts could not be encoded.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ConfigError(
            f"{path} is no tiktoken vocabulary: {line[:40]!r} is not a token in base64 and its rank; download it again"
        ) from error
    if absent := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise ConfigError(f"{path} has no token for {absent} of the 256 bytes; download it again")
    return ranks
