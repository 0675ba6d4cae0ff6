"""The tokenizer that a family's `Traits` and a vocabulary file make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lamella.tokenizer import TokenizerBase
from lamella.tokenizers.chat_formats import ChatFormat, check_messages
from lamella.tokenizers.declarations import Declarations
from lamella.tokenizers.vocabulary import Vocabulary
from lamella_core.errors import ConfigError, RequestError


@dataclass(frozen=True)
class Traits:
    """What a family adds to its vocabulary file. All tokens are named by their text."""

    tokens: Mapping[str, int]  # cut out of every text before the vocabulary sees it: name -> id
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    prefix: tuple[str, ...] = ()  # what add_special_tokens puts in front
    suffix: tuple[str, ...] = ()  # and behind
    masks: tuple[str, ...] = ()  # one of them must be in a prompt: the first goes behind texts that have none
    chat: ChatFormat | None = None  # for directories without a template
    turn_ends: tuple[str, ...] = ()  # what a chat model writes when its turn is over, beside eos


class FamilyTokenizer(TokenizerBase):
    """Cuts special tokens out of a text, leaves the rest to the vocabulary; both decode to what was encoded."""

    def __init__(self, declared: Declarations, vocabulary: Vocabulary, traits: Traits) -> None:
        self.directory = declared.directory
        self._declared = declared
        self._vocabulary = vocabulary
        self._traits = traits
        self._names = {token_id: name for name, token_id in traits.tokens.items()}
        self._cut = re.compile("(" + "|".join(map(_token_pattern, sorted(traits.tokens, key=len, reverse=True))) + ")")
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(self._id, (traits.bos, traits.eos, traits.pad))
        self.special_token_ids = frozenset(i for i, name in self._names.items() if name not in declared.plain)
        self.turn_end_token_ids = tuple(traits.tokens[name] for name in traits.turn_ends)

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._traits.tokens.get(name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._cut.split(text)):  # texts at even places, tokens at odd ones
            if i % 2:
                ids.append(self._traits.tokens[part])
            elif part:
                ids += self._vocabulary.encode(part)
        return self._surround(ids) if add_special_tokens else ids

    def _surround(self, ids: list[int]) -> list[int]:
        tokens, masks = self._traits.tokens, self._traits.masks
        is_masked = not masks or any(tokens[name] in ids for name in masks)
        suffix = self._traits.suffix if is_masked else (masks[0], *self._traits.suffix)
        return [tokens[name] for name in self._traits.prefix] + ids + [tokens[name] for name in suffix]

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if i not in self.special_token_ids]
        runs = [(is_token, list(run)) for is_token, run in groupby(ids, key=self._names.__contains__)]
        names = self._names
        return "".join("".join(names[i] for i in r) if named else self._vocabulary.decode(r) for named, r in runs)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._names[i] if i in self._names else self._vocabulary.piece(i) for i in ids]

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> Any:
        template = variables.pop("chat_template", None) or self._declared.template
        if template is not None:
            text = self._render(template, messages, add_generation_prompt, variables)
        elif self._traits.chat is None:
            raise ConfigError("this model's tokenizer has no chat template; pass plain text or token ids")
        elif given := sorted(name for name, value in variables.items() if value):
            raise RequestError(f"this model's built-in chat format takes no {', '.join(given)}; pass chat_template=")
        else:
            text = self._traits.chat(check_messages(messages), add_generation_prompt)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _render(self, template: str, messages: Any, add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        traits = self._traits
        names = {"bos": traits.bos, "eos": traits.eos, "pad": traits.pad, "unk": self._declared.token("unk")}
        variables = {**{f"{role}_token": name for role, name in names.items() if name}, **variables}
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise RequestError(
                f"the chat template cannot render the messages ({type(error).__name__}: {error}); pass a list of dicts "
                "such as {'role': 'user', 'content': '...'}"
            ) from error
        return rendered[0]


def _token_pattern(name: str) -> str:
    """Returns the pattern of a token in a text; ChatGLM's "sop" and "eop" are words too unless a mask precedes them."""
    return (r"(?<=MASK\])" if name.isalpha() else "") + re.escape(name)
