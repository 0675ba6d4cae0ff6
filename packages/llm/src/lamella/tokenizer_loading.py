"""From what the user passed as ``tokenizer`` (nothing, a directory, a hub id, an object) to a `TokenizerBase`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella.tokenizer import CustomTokenizer, TokenizerBase, TokenizersTokenizer, TransformersTokenizer
from lamella.tokenizers.families import load_family_tokenizer
from lamella_core.errors import ConfigError

# Classes that take a tokenizer.json as it is; every other class may rebuild parts of it.
_AS_IS_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
MODES = ("auto", "slow")


def load_tokenizer(
    source: object, *, model_dir: Path | None, mode: str = "auto", revision: str | None = None
) -> TokenizerBase:
    """Returns the tokenizer for a model.

    Args:
        source: None (use ``model_dir``), a directory or hub id, a `transformers` tokenizer, a `TokenizerBase`, or any
            object with ``encode`` and ``decode``.
        model_dir: where the model came from.
        mode: "auto", or "slow" for the pure Python implementation of `transformers`.
        revision: of a hub id.

    Raises:
        ConfigError: no usable tokenizer; the message says how to go without.
    """
    if mode not in MODES:
        raise ConfigError(f"tokenizer_mode is {mode!r}; allowed: {', '.join(MODES)}")
    if source is None or isinstance(source, str | Path):
        return _from_directory(source if source is not None else model_dir, mode, revision)
    if isinstance(source, TokenizerBase):
        return source
    if isinstance(source, type):
        raise ConfigError(f"tokenizer is the class {source.__name__}; pass an object of it")
    if not (callable(getattr(source, "encode", None)) and callable(getattr(source, "decode", None))):
        raise ConfigError(
            f"tokenizer is {type(source).__name__}; it must be a directory, a hub id or an object with encode(text) "
            "and decode(ids)"
        )
    if hasattr(source, "all_special_ids") and hasattr(source, "chat_template"):
        return TransformersTokenizer(source)
    return CustomTokenizer(source)


def _from_directory(source: str | Path | None, mode: str, revision: str | None) -> TokenizerBase:
    if source is None:
        raise ConfigError(
            "the model brings no tokenizer; pass tokenizer= (a directory or an object), or skip_tokenizer_init=True "
            "and prompts of token ids"
        )
    directory = Path(source)
    if directory.is_dir():
        config = _as_is_config(directory) if mode == "auto" else None
        if config is not None:
            return TokenizersTokenizer(directory, config)
        family = load_family_tokenizer(directory)
        if family is not None:
            return family
    elif not _is_hub_id(str(source)):
        raise ConfigError(f"tokenizer directory {str(source)!r} does not exist")
    return TransformersTokenizer.load(str(source), use_fast=mode == "auto", revision=revision)


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~"))


def _as_is_config(directory: Path) -> dict[str, Any] | None:
    """Returns tokenizer_config.json if ``tokenizer.json`` alone says all there is to know, else None.

    Raises:
        ConfigError: tokenizer_config.json is not JSON.
    """
    path = directory / "tokenizer_config.json"
    if not (directory / "tokenizer.json").is_file() or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    rebuilt = {"add_bos_token", "add_eos_token", "auto_map"} & config.keys()
    return config if config.get("tokenizer_class") in _AS_IS_CLASSES and not rebuilt else None


def bad_word_sequences(tokenizer: TokenizerBase, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns the token sequences that spell each word, at the start of a text and after a space.

    A word can be spelled in other ways too (split unusually, other capitals); those are not banned.
    """
    newline = tokenizer.encode("\n", add_special_tokens=False)
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelling in (word, " " + word.lstrip()):
            found[tuple(tokenizer.encode(spelling, add_special_tokens=False))] = None
        # Tokenizers that put a space before every text show the word without it only behind other text.
        joined = tokenizer.encode("\n" + word, add_special_tokens=False)
        if newline and joined[: len(newline)] == newline:
            found[tuple(joined[len(newline) :])] = None
    return [ids for ids in found if ids]
