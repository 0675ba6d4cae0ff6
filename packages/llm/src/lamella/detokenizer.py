"""Text from tokens as they come: the `TextDecoder` that the executor feeds.

A tokenizer's decode is not additive: a character may be split over tokens, and decoders treat the first token
specially. So each new piece is the difference between two decodes over a short window that starts with tokens whose
text is already out (they give the context), and nothing is emitted while the window ends in half a character. The cost
per token does not depend on how long the text is.

The pieces add up to the full decode, with one exception: tokenizers with byte fallback turn a whole run of byte tokens
into U+FFFD when one of them is invalid, which would take back characters that are already out. Those stay.
"""

from __future__ import annotations

from lamella.tokenizer import TokenizerBase

REPLACEMENT = "\ufffd"
MAX_PENDING = 16  # tokens held back before looking for a safe place to cut
_HARD_LIMIT = 64  # tokens held back at most


class IncrementalDecoder:
    """Decodes one sequence of generated tokens. Not thread-safe; `fork` gives an independent copy."""

    __slots__ = ("_context", "_pending", "_skip_special", "_spaces", "_text", "_tokenizer")

    def __init__(
        self, tokenizer: TokenizerBase, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._context: list[int] = []  # tokens whose text is out, decoded again to give the next ones their context
        self._pending: list[int] = []  # tokens whose text is not out yet
        self._text = ""

    @property
    def text(self) -> str:
        """The text so far; never ends in half a character."""
        return self._text

    def push(self, token_id: int) -> None:
        """Appends one generated token."""
        if self._skip_special and token_id in self._tokenizer.special_token_ids:
            return
        self._pending.append(token_id)
        piece = self._piece(len(self._pending))
        if piece and not piece.endswith(REPLACEMENT):
            self._emit(piece, len(self._pending))
        elif len(self._pending) >= MAX_PENDING:
            self._emit_prefix(piece)

    def finish(self) -> None:
        """Emits what was held back; half a character becomes U+FFFD."""
        if self._pending:
            self._emit(self._piece(len(self._pending)), len(self._pending))

    def fork(self) -> IncrementalDecoder:
        """Returns an independent copy."""
        other = IncrementalDecoder(
            self._tokenizer, skip_special_tokens=self._skip_special, spaces_between_special_tokens=self._spaces
        )
        other._context, other._pending, other._text = list(self._context), list(self._pending), self._text
        return other

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=self._spaces)

    def _piece(self, count: int) -> str:
        """Returns what the first ``count`` pending tokens add to the text."""
        before = self._decode(self._context) if self._context else ""
        after = self._decode(self._context + self._pending[:count])
        return after[len(before) :] if after.startswith(before) else self._decode(self._pending[:count])

    def _emit(self, piece: str, count: int) -> None:
        self._text += piece
        self._context, self._pending = self._pending[:count], self._pending[count:]

    def _emit_prefix(self, piece: str) -> None:
        """Emits the longest head of a run of invalid bytes that later tokens cannot change."""
        for cut in range(len(self._pending) - 1, 0, -1):
            head = self._piece(cut)
            if head + self._decode(self._pending[cut:]) == piece:
                self._emit(head, cut)
                return
        if len(self._pending) >= _HARD_LIMIT:
            self._emit(piece, len(self._pending))
