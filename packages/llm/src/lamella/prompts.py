"""What users pass as prompts and sampling parameters, made uniform and checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamella.detokenizer import IncrementalDecoder
from lamella.tokenizer import TokenizerBase, check_text
from lamella.tokenizer_loading import bad_word_sequences
from lamella_core.errors import RequestError
from lamella_executor import SamplingParams

PromptInput = str | Sequence[int] | dict[str, Any]
_PROMPT_KEYS = ("prompt", "prompt_token_ids")


@dataclass(frozen=True)
class PreparedPrompt:
    """One request, ready for the executor."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    decoder: IncrementalDecoder | None  # None: the outputs have no text
    bad_words_ids: list[tuple[int, ...]]


def is_single(inputs: Any) -> bool:
    """Whether ``inputs`` is one prompt (text, token ids or a dict) rather than a list of prompts."""
    if isinstance(inputs, str | bytes | dict):
        return True
    if not isinstance(inputs, Sequence):
        return not hasattr(inputs, "__iter__") or getattr(inputs, "ndim", 2) <= 1  # an array of token ids
    return len(inputs) > 0 and not isinstance(inputs[0], str | bytes | dict | Sequence) and _is_int(inputs[0])


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__")


def params_for(params: Any, count: int) -> list[SamplingParams]:
    """Returns one SamplingParams per prompt of a batch.

    Raises:
        RequestError: not a SamplingParams, or a list of another length than the prompts.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(f"sampling_params is {type(params).__name__}; pass a SamplingParams or a list of them")
    if len(params) != count:
        raise RequestError(
            f"sampling_params has {len(params)} entries for {count} prompts; pass one, or one per prompt"
        )
    return list(params)


def one_params(params: Any) -> SamplingParams:
    """Returns the SamplingParams of a single prompt.

    Raises:
        RequestError: it is a list or something else.
    """
    if isinstance(params, list | tuple):
        raise RequestError("sampling_params is a list, but there is a single prompt; pass one SamplingParams")
    return params_for(params, 1)[0]


def prepare(prompt: Any, params: SamplingParams, tokenizer: TokenizerBase | None) -> PreparedPrompt:
    """Tokenizes one prompt and makes what its output needs.

    Text prompts get text back. Token-id prompts get token ids back and ``text == ''``, unless stop strings are set,
    which need the text. A dict with both keys is a text prompt that is already tokenized.

    Raises:
        RequestError: the prompt or a field that needs a tokenizer is invalid.
    """
    text, ids = _split(prompt)
    if text is not None and ids is None:
        check_text(text)
        if tokenizer is None:
            raise RequestError("the prompt is text, but this LLM has no tokenizer; pass token ids, or a tokenizer=")
        ids = tokenizer.encode(text, add_special_tokens=params.add_special_tokens)
        if not ids:
            raise RequestError(f"the prompt {text[:40]!r} has no tokens; the tokenizer drops all of its characters")
    for name in ("stop", "bad"):
        if getattr(params, name) and tokenizer is None:
            raise RequestError(
                f"SamplingParams.{name} is {getattr(params, name)!r}, but this LLM has no tokenizer; "
                f"use {'stop_token_ids' if name == 'stop' else 'bad_token_ids'}"
            )
    for word in params.stop or ():
        check_text(word, "SamplingParams.stop")
    decoder = None
    if tokenizer is not None and ((params.detokenize and text is not None) or params.stop):
        decoder = IncrementalDecoder(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
    bad = bad_word_sequences(tokenizer, _checked(params.bad)) if params.bad and tokenizer is not None else []
    return PreparedPrompt(text, list(ids or ()), params, decoder, bad)


def _checked(words: Any) -> list[str]:
    return [check_text(word, "SamplingParams.bad") for word in words]


def _split(prompt: Any) -> tuple[str | None, Sequence[int] | None]:
    """Returns text and token ids of a prompt; one of them may be missing."""
    if isinstance(prompt, dict):
        unknown = set(prompt) - set(_PROMPT_KEYS)
        if unknown or not prompt:
            raise RequestError(f"a prompt dict has the keys {list(prompt)}; known: {', '.join(_PROMPT_KEYS)}")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and ids is None:
            raise RequestError(f"a prompt dict holds nothing but None; set one of: {', '.join(_PROMPT_KEYS)}")
        return (check_text(text) if text is not None else None), (_ids(ids) if ids is not None else None)
    if isinstance(prompt, str | bytes | bytearray):
        return check_text(prompt), None
    return None, _ids(prompt)


def _ids(value: Any) -> list[int]:
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RequestError(f"prompt is {type(value).__name__}; it must be a string or a list of token ids")
    if not values:
        raise RequestError("prompt has no token ids; at least one is needed (for example the bos token)")
    return list(values)
