"""What a vocabulary file does: plain text to token ids and back. One module per library that reads such files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lamella_core.errors import ConfigError


class Vocabulary(Protocol):
    """Plain text to token ids and back; knows nothing of a family's special tokens unless its file holds them."""

    @property
    def size(self) -> int:
        """The number that the first token beyond the file gets."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of ``text``, in which nothing is special."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""

    def piece(self, token_id: int) -> str:
        """Returns what the file calls a token, or an empty string."""

    def id_of(self, piece: str) -> int | None:
        """Returns the id of the token that the file calls ``piece``."""


def needs_library(name: str, path: Path) -> ConfigError:
    """Returns the error of a vocabulary file whose optional library is not installed."""
    return ConfigError(
        f"{path} needs the {name} library; install it with pip install 'lamella[tokenizers]', or pass "
        "skip_tokenizer_init=True and prompts of token ids"
    )
