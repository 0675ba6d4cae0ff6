"""Tokenizers: one small interface over `tokenizers`, `transformers` and the user's own objects.

Text here is what the tokenizer's decoder says and nothing else: the optional "clean up" of spaces before punctuation
that some directories ask for is never applied, because it loses characters. Code of a model repository is never run.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

from lamella_core.errors import ConfigError, RequestError


def check_text(text: object, what: str = "prompt") -> str:
    """Returns ``text`` if it is a non-empty string that UTF-8 can hold.

    Raises:
        RequestError: not a string, empty, or holding a lone surrogate (text that was decoded wrongly).
    """
    if isinstance(text, bytes | bytearray):
        raise RequestError(f"{what} is {type(text).__name__}; decode it to str first, for example data.decode('utf-8')")
    if not isinstance(text, str):
        raise RequestError(f"{what} is {type(text).__name__}; it must be a string or a list of token ids")
    if not text:
        raise RequestError(f"{what} is empty; give at least one character, or token ids such as [bos_token_id]")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} is not valid Unicode text: character {error.start} is the lone surrogate "
            f"{ascii(text[error.start])}; it was probably decoded with the wrong encoding"
        ) from None
    return text


class TokenizerBase(ABC):
    """What Lamella needs of a tokenizer. Subclass it, or pass any object that has ``encode`` and ``decode``."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    special_token_ids: frozenset[int] = frozenset()  # what skip_special_tokens leaves out
    turn_end_token_ids: tuple[int, ...] = ()  # what ends an answer in its chat format, where the model's eos does not
    directory: Path | None = None  # where its files are, if they are on disk

    @abstractmethod
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of ``text``; ``add_special_tokens`` puts what the model expects around it (bos)."""

    def encode_pair(self, text: str, text_pair: str) -> tuple[list[int], list[int]]:
        """Returns the token ids of two texts as the model expects a pair, and which of them each token is in.

        Raises:
            RequestError: this tokenizer does not know how pairs are written.
        """
        raise RequestError(
            f"{type(self).__name__} cannot encode pairs of texts; pass prompt_token_ids and token_type_ids"
        )

    @abstractmethod
    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Returns the text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> Any:
        """Returns the prompt text of a conversation, or its token ids with ``tokenize=True``.

        The text already holds the special tokens: generate from it with ``SamplingParams(add_special_tokens=False)``.

        Raises:
            ConfigError: this tokenizer has no chat template.
            RequestError: the template cannot render the messages.
        """
        raise ConfigError(f"{type(self).__name__} has no chat template; pass plain text or token ids")

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Returns the vocabulary piece of each id; the text of the single id where pieces are unknown."""
        return [self.decode([i], skip_special_tokens=False) for i in ids]

    def save(self, directory: Path) -> bool:
        """Writes the tokenizer's files into ``directory``; returns False when it has none. For those not on disk."""
        return False


class TokenizersTokenizer(TokenizerBase):
    """A ``tokenizer.json`` read directly by the `tokenizers` library, which loads in milliseconds.

    Only the chat template needs `transformers`; it is imported when the first one is rendered.
    """

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.directory = directory
        path = directory / "tokenizer.json"
        try:
            self._backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError(f"{path} is damaged: {error}; copy it again") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        for name in ("bos", "eos", "pad"):
            setattr(self, f"{name}_token_id", self._special_id(config.get(f"{name}_token")))
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)

    def _special_id(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(content) if content else None

    @cached_property
    def _full(self) -> TransformersTokenizer:
        return TransformersTokenizer.load(str(self.directory))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(self, text: str, text_pair: str) -> tuple[list[int], list[int]]:
        encoding = self._backend.encode(text, text_pair)
        return encoding.ids, encoding.type_ids

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        return self._full.apply_chat_template(messages, **options)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._backend.id_to_token(i) or "" for i in ids]


class TransformersTokenizer(TokenizerBase):
    """A `transformers` tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self.special_token_ids = frozenset(tokenizer.all_special_ids)
        if self._backend is not None:
            added = self._backend.get_added_tokens_decoder()
            self.special_token_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, source: str, *, use_fast: bool = True, revision: str | None = None) -> TransformersTokenizer:
        """Reads the tokenizer of a local directory or of the hub's cache; never runs the repository's code.

        Raises:
            ConfigError: there is none, or it needs repository code or a missing library.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, use_fast=use_fast, revision=revision, trust_remote_code=False
            )
        except Exception as error:  # the libraries raise anything on damaged files
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"no usable tokenizer in {source!r} ({reason}); pass tokenizer= (a directory or an object), or "
                "skip_tokenizer_init=True and prompts of token ids"
            ) from error
        if not tokenizer.vocab_size:  # some classes are made without any file
            raise ConfigError(
                f"no usable tokenizer in {source!r} (its vocabulary is empty); pass tokenizer= (a directory or an "
                "object), or skip_tokenizer_init=True and prompts of token ids"
            )
        loaded = cls(tokenizer)
        loaded.directory = Path(source) if Path(source).is_dir() else None
        return loaded

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_pair(self, text: str, text_pair: str) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer(text, text_pair, return_token_type_ids=True)
        return list(encoding["input_ids"]), list(encoding["token_type_ids"])

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        if self._backend is not None:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return self._tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> Any:
        if not self._tokenizer.chat_template and "chat_template" not in variables:
            raise ConfigError("this model's tokenizer has no chat template; pass plain text or token ids")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False, **variables
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise RequestError(
                f"the chat template cannot render the messages ({type(error).__name__}: {error}); pass a list of dicts "
                "such as {'role': 'user', 'content': '...'}"
            ) from error
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [token or "" for token in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def save(self, directory: Path) -> bool:
        self._tokenizer.save_pretrained(str(directory))
        return True


class CustomTokenizer(TokenizerBase):
    """The user's own object: ``encode(text) -> ids`` and ``decode(ids) -> text``; everything else is optional.

    Keyword arguments (``add_special_tokens``, ``skip_special_tokens``) are passed on only if the object takes them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encode_takes = _keywords(tokenizer.encode, ("add_special_tokens",))
        self._decode_takes = _keywords(tokenizer.decode, ("skip_special_tokens", "spaces_between_special_tokens"))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(tokenizer, name, None))
        special = getattr(tokenizer, "special_token_ids", None)
        self.special_token_ids = frozenset(getattr(tokenizer, "all_special_ids", ()) if special is None else special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        options = {"add_special_tokens": add_special_tokens} if self._encode_takes else {}
        ids = self._tokenizer.encode(text, **options)
        try:
            return [index(i) for i in getattr(ids, "ids", ids)]
        except TypeError:
            name = type(self._tokenizer).__name__
            raise RequestError(
                f"{name}.encode returned {type(ids).__name__} {str(ids)[:40]!r}; it must be a sequence of integers"
            ) from None

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        options = {
            "skip_special_tokens": skip_special_tokens,
            "spaces_between_special_tokens": spaces_between_special_tokens,
        }
        return self._tokenizer.decode(list(ids), **{k: v for k, v in options.items() if k in self._decode_takes})

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        render = getattr(self._tokenizer, "apply_chat_template", None)
        if render is None:
            return super().apply_chat_template(messages, **options)
        return render(messages, **options)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        convert = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        return list(convert(list(ids))) if convert else super().convert_ids_to_tokens(ids)

    def save(self, directory: Path) -> bool:
        write = getattr(self._tokenizer, "save_pretrained", None)
        if write is not None:
            write(str(directory))
        return write is not None


def _keywords(function: Any, names: tuple[str, ...]) -> frozenset[str]:
    """Returns which of ``names`` the function takes as keyword arguments."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return frozenset()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return frozenset(names)
    return frozenset(n for n in names if n in parameters)
