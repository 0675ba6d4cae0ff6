"""What the JSON files of a directory say of its tokenizer: its class, its special tokens, its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lamella.tokenizers.vocabulary import Vocabulary
from lamella_core.checkpoint.formats import read_json_object
from lamella_core.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Declarations:
    """The JSON files beside a vocabulary file; all of them may be missing.

    Raises:
        ConfigError: (on first use) a file is not a JSON object.
    """

    directory: Path

    def read(self, name: str) -> dict[str, Any]:
        """Returns a file's content, empty if there is no such file."""
        path = self.directory / name
        try:
            return read_json_object(path) if path.is_file() else {}
        except CheckpointError as error:
            raise ConfigError(str(error)) from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of special_tokens_map.json and tokenizer_config.json; the latter has the last word."""
        return {**self.read("special_tokens_map.json"), **self.read("tokenizer_config.json")}

    @property
    def class_name(self) -> str | None:
        """The class that the repository's own code would use, without "Fast". Only its name matters here."""
        entry = (self.config.get("auto_map") or {}).get("AutoTokenizer")
        in_map = next((name for name in entry if name), None) if isinstance(entry, list) else entry
        name = self.config.get("tokenizer_class") or in_map
        return str(name).rpartition(".")[2].removesuffix("Fast") if name else None

    def token(self, role: str, default: str | None = None) -> str | None:
        """Returns the token for a role such as "bos" that the files name, or ``default``."""
        return _content(self.config.get(f"{role}_token")) or default

    @cached_property
    def _listed(self) -> dict[str, dict[str, Any]]:
        """The tokens of tokenizer_config.json by number."""
        listed = self.config.get("added_tokens_decoder") or {}
        for number, token in listed.items():
            if not number.isdecimal() or not isinstance(token, dict) or "content" not in token:
                raise ConfigError(
                    f"added_tokens_decoder of tokenizer_config.json in {self.directory} is damaged: {number!r} is "
                    f"{token!r}, and must be a number with a content; copy the file again"
                )
        return listed

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens with numbers of their own, which hold also where the vocabulary file says otherwise."""
        listed = {str(token["content"]): int(i) for i, token in self._listed.items()}
        return {**self.read("added_tokens.json"), **listed}

    @property
    def plain(self) -> frozenset[str]:
        """Added tokens that are not special."""
        return frozenset(token["content"] for token in self._listed.values() if not token.get("special", True))

    @cached_property
    def template(self) -> str | None:
        """The chat template, in Jinja."""
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.config.get("chat_template") or self.read("chat_template.json").get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def known(self, vocabulary: Vocabulary, names: Iterable[str | None]) -> dict[str, int]:
        """Returns the added tokens, and those of ``names`` that the vocabulary file holds."""
        found = {name: vocabulary.id_of(name) for name in names if name}
        return {**{name: i for name, i in found.items() if i is not None}, **self.added}

    def required(self, vocabulary: Vocabulary, names: Iterable[str]) -> dict[str, int]:
        """Returns the added tokens and ``names``.

        Raises:
            ConfigError: a name has no number.
        """
        tokens = self.known(vocabulary, names)
        if missing := [name for name in names if name not in tokens]:
            raise ConfigError(
                f"the vocabulary in {self.directory} has no token {', '.join(missing)}, which this "
                "family needs; copy added_tokens.json and tokenizer_config.json too"
            )
        return tokens


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
