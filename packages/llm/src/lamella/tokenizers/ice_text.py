"""The vocabulary of ChatGLM-6B, ``ice_text.model``: sentencepiece with own tokens for blanks, behind image tokens.

The first release of the file holds text pieces only, and the special tokens, blanks and bytes were added when it was
read; the later one holds them. Both number them alike.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

from lamella.tokenizers.sentencepiece_file import SentencePieceVocabulary

SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_NEWLINE, _TAB = "<n>", "<|tab|>"
_MAX_BLANKS = 80
_BLANKS = re.compile(f" {{2,{_MAX_BLANKS}}}")
_BLANK_TOKEN = re.compile(r"<\|blank_(\d{1,2})\|>")
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # sentencepiece_model.proto: ModelProto.SentencePiece.Type
_BYTE_FALLBACK = b"\x12\x03\x98\x02\x01"  # ModelProto.trainer_spec (2) { byte_fallback (35): true }


class IceTextVocabulary:
    """Text pieces are numbered from ``num_image_tokens`` on; the image tokens before them have no text."""

    def __init__(self, path: Path, num_image_tokens: int) -> None:
        """Reads a vocabulary of either release.

        Raises:
            ConfigError: sentencepiece is not installed; the file is no vocabulary.
        """
        self._offset = num_image_tokens
        self._pieces = SentencePieceVocabulary(path)
        if self._pieces.id_of("[gMASK]") is None:
            self._pieces = SentencePieceVocabulary(path, additions=_additions())
        self.size = self._offset + self._pieces.size

    def encode(self, text: str) -> list[int]:
        text = text.replace("\n", _NEWLINE).replace("\t", _TAB)
        text = _BLANKS.sub(lambda blanks: f"<|blank_{len(blanks[0])}|>", text)
        return [i + self._offset for i in self._pieces.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        text = self._pieces.decode([i - self._offset for i in ids])
        text = text.replace(_NEWLINE, "\n").replace(_TAB, "\t")
        return _BLANK_TOKEN.sub(_blanks, text)

    def piece(self, token_id: int) -> str:
        if 0 <= token_id < self._offset:
            return f"<image_{token_id}>"
        return self._pieces.piece(token_id - self._offset)

    def id_of(self, piece: str) -> int | None:
        token_id = self._pieces.id_of(piece)
        return None if token_id is None else token_id + self._offset


def _blanks(token: re.Match[str]) -> str:
    count = int(token[1])
    return " " * count if 2 <= count <= _MAX_BLANKS else token[0]


def _additions() -> bytes:
    """Returns the fields that the first release's file lacks: a protocol buffer grows by appending to it."""
    pieces = [(name, _CONTROL) for name in SPECIAL_TOKENS]
    pieces += [(name, _USER_DEFINED) for name in (_TAB, *(f"<|blank_{n}|>" for n in range(2, _MAX_BLANKS + 1)))]
    pieces += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    return b"".join(_encoded_piece(name, kind) for name, kind in pieces) + _BYTE_FALLBACK


def _encoded_piece(name: str, kind: int) -> bytes:
    """Returns ModelProto.pieces (1) { piece (1): name, score (2): 0, type (3): kind }; all lengths are below 128."""
    text = name.encode()
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body
