"""Tokenizers: the direct path equals transformers, custom objects fit, and bad ones are refused clearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.support.text_models import TEXT, byte_fallback_backend, byte_level_tokenizer

from lamella.tokenizer import CustomTokenizer, TokenizersTokenizer, TransformersTokenizer
from lamella.tokenizer_loading import bad_word_sequences, load_tokenizer
from lamella_core.errors import ConfigError, RequestError

MESSAGES = [{"role": "user", "content": "Tell me of the fox."}]


class Characters:
    """A user's tokenizer: one id per character, no other knowledge."""

    def encode(self, text):
        return [ord(c) % 100 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_direct_path_equals_transformers(model_dir: Path):
    direct = load_tokenizer(None, model_dir=model_dir)
    full = TransformersTokenizer.load(str(model_dir))
    assert isinstance(direct, TokenizersTokenizer)
    for text in (TEXT, "", " a", "naïve 😀", "</s> inside"):
        for special in (True, False):
            ids = direct.encode(text, add_special_tokens=special)
            assert ids == full.encode(text, add_special_tokens=special)
            assert direct.decode(ids) == full.decode(ids)
    assert direct.special_token_ids == full.special_token_ids
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(direct, name) == getattr(full, name) is not None
    assert direct.convert_ids_to_tokens([0, 5]) == full.convert_ids_to_tokens([0, 5])


def test_classes_that_rebuild_the_tokenizer_go_through_transformers(model_dir: Path, tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(model_dir / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_eos_token": True}))
    assert isinstance(load_tokenizer(None, model_dir=tmp_path), TransformersTokenizer)
    assert isinstance(load_tokenizer(None, model_dir=model_dir, mode="slow"), TransformersTokenizer)


def test_chat_template(model_dir: Path):
    tokenizer = load_tokenizer(None, model_dir=model_dir)
    text = tokenizer.apply_chat_template(MESSAGES)
    assert text == "<s><|user|>Tell me of the fox.<|assistant|>"
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == "<s><|user|>Tell me of the fox."
    ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    for wrong in ("hello", []):
        with pytest.raises(RequestError, match="chat template cannot render"):
            tokenizer.apply_chat_template(wrong)
    with pytest.raises(ConfigError, match="no chat template"):
        CustomTokenizer(Characters()).apply_chat_template(MESSAGES)


def test_custom_objects():
    tokenizer = load_tokenizer(Characters(), model_dir=None)
    assert tokenizer.encode("ab", add_special_tokens=True) == [97, 98]
    assert tokenizer.decode([0, 1], skip_special_tokens=True) == "ab"
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["a", "b"]
    assert tokenizer.eos_token_id is None
    assert load_tokenizer(tokenizer, model_dir=None) is tokenizer
    assert isinstance(load_tokenizer(byte_level_tokenizer(), model_dir=None), TransformersTokenizer)


@pytest.mark.parametrize("ids", ["abc", None, [1.5]])
def test_custom_objects_that_return_no_ids(ids: object):
    characters = Characters()
    characters.encode = lambda text: ids
    with pytest.raises(RequestError, match="Characters.encode returned .*sequence of integers"):
        load_tokenizer(characters, model_dir=None).encode("a")


def test_bare_tokenizers_objects_are_custom_objects():
    tokenizer = load_tokenizer(byte_fallback_backend(), model_dir=None)
    ids = tokenizer.encode("a fox", add_special_tokens=False)
    assert tokenizer.decode(ids) == "a fox"


@pytest.mark.parametrize(
    ("source", "match"),
    [(3, "encode"), (Characters, "class Characters"), ("./missing", "does not exist"), (None, "brings no tokenizer")],
)
def test_bad_sources(source, match):
    with pytest.raises(ConfigError, match=match):
        load_tokenizer(source, model_dir=None)


def test_bad_mode_and_directory_without_tokenizer(tmp_path: Path):
    with pytest.raises(ConfigError, match="tokenizer_mode is 'fast'"):
        load_tokenizer(None, model_dir=tmp_path, mode="fast")
    with pytest.raises(ConfigError, match="no usable tokenizer.*skip_tokenizer_init"):
        load_tokenizer(None, model_dir=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # transformers makes an empty tokenizer of it
    with pytest.raises(ConfigError, match="no usable tokenizer.*vocabulary is empty.*skip_tokenizer_init"):
        load_tokenizer(None, model_dir=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_tokenizer(None, model_dir=tmp_path)
    for name, message in (
        ("PreTrainedTokenizerFast", "tokenizer.json is damaged.*copy it again"),
        ("GPT2Tokenizer", "no usable"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(None, model_dir=tmp_path)


def test_bad_words_with_and_without_space():
    byte_level = load_tokenizer(byte_level_tokenizer(), model_dir=None)
    found = bad_word_sequences(byte_level, ["fox"])
    texts = {byte_level.decode(ids) for ids in found}
    assert texts == {"fox", " fox"}
    sentencepiece = CustomTokenizer(byte_fallback_backend())
    to_piece = byte_fallback_backend().id_to_token
    pieces = {tuple(map(to_piece, ids)) for ids in bad_word_sequences(sentencepiece, ["a"])}
    assert ("▁", "a") in pieces and ("a",) in pieces
