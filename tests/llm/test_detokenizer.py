"""Incremental text equals the full decode, and never shows half a character."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.text_models import byte_fallback_backend, byte_level_tokenizer

from lamella.detokenizer import IncrementalDecoder
from lamella.tokenizer import TokenizerBase, TransformersTokenizer


class Backend(TokenizerBase):
    """A bare `tokenizers` tokenizer."""

    def __init__(self, backend):
        self.backend = backend
        self.special_token_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens=True, spaces_between_special_tokens=True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


@functools.cache
def byte_level() -> TokenizerBase:
    return TransformersTokenizer(byte_level_tokenizer())


@functools.cache
def byte_fallback() -> Backend:
    return Backend(byte_fallback_backend())


def run(tokenizer: TokenizerBase, ids: Sequence[int], **options) -> tuple[str, list[str]]:
    decoder = IncrementalDecoder(tokenizer, **options)
    shown = []
    for token in ids:
        decoder.push(token)
        shown.append(decoder.text)
    decoder.finish()
    return decoder.text, shown


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 430), max_size=80), skip=st.booleans())  # 420.. are ids without a token
def test_byte_level_equals_full_decode(ids, skip):
    tokenizer = byte_level()
    text, shown = run(tokenizer, ids, skip_special_tokens=skip)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert all(text.startswith(part) for part in shown)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 120))
def test_runs_of_invalid_bytes_equal_full_decode(seed, length):
    tokenizer = byte_level()
    single_bytes = [i for i in range(len(SINGLE)) if SINGLE[i]]
    ids = random.Random(seed).choices(single_bytes, k=length)
    assert run(tokenizer, ids)[0] == tokenizer.decode(ids)


SINGLE = [len(t) == 1 and not t.isascii() for t in byte_level().convert_ids_to_tokens(range(420))]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_survives_and_no_half_character_is_shown(text):
    for tokenizer in (byte_level(), byte_fallback()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        full = tokenizer.decode(ids)
        result, shown = run(tokenizer, ids)
        assert result == full
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in shown)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.integers(3 + 256, 3 + 256 + 13), max_size=40))
def test_byte_fallback_words_equal_full_decode(words):
    tokenizer = byte_fallback()
    assert run(tokenizer, words)[0] == tokenizer.decode(words)


def test_byte_fallback_keeps_characters_that_are_out_when_an_invalid_byte_follows():
    tokenizer = byte_fallback()
    euro = [3 + byte for byte in "€".encode()]
    text, shown = run(tokenizer, [*euro, 3 + 0xFF, *tokenizer.encode("a")[1:]])
    assert shown[2] == "€"
    assert text == "€\ufffda"


def test_characters_appear_as_soon_as_their_last_byte():
    tokenizer = byte_level()
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) == 4
    assert run(tokenizer, ids)[1] == ["", "", "", "😀"]


def test_finish_flushes_half_a_character():
    tokenizer = byte_level()
    ids = tokenizer.encode("é😀", add_special_tokens=False)[:-1]
    text, shown = run(tokenizer, ids)
    assert shown[-1] == "é"
    assert text == "é\ufffd"


def test_special_tokens_are_skipped_or_kept():
    tokenizer = byte_level()
    ids = [*tokenizer.encode("a", add_special_tokens=False), 1, *tokenizer.encode(" b", add_special_tokens=False)]
    assert run(tokenizer, ids)[0] == "a b"
    assert run(tokenizer, ids, skip_special_tokens=False)[0] == "a</s> b"


def test_forks_are_independent():
    tokenizer = byte_level()
    smile = tokenizer.encode("😀", add_special_tokens=False)
    frown = tokenizer.encode("😢", add_special_tokens=False)
    first = IncrementalDecoder(tokenizer)
    for token in smile[:3]:
        first.push(token)
    second = first.fork()
    first.push(smile[3])
    second.push(frown[3])
    assert (first.text, second.text) == ("😀", "😢")


@pytest.mark.parametrize("token", [300, None], ids=["words", "invalid bytes"])
def test_cost_per_token_does_not_grow(token):
    """A work count rather than a time: ids decoded per pushed token stay bounded."""
    tokenizer = byte_level()
    token = token if token is not None else SINGLE.index(True)
    decoded = 0

    class Counting(Backend):
        def decode(self, ids, **options):
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids, **options)

    decoder = IncrementalDecoder(Counting(byte_fallback_backend()))
    for _ in range(2000):
        decoder.push(token)
    assert decoded < 2000 * 120
