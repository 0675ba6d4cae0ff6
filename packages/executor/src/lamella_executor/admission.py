"""Admission: a prompt and SamplingParams become a `RequestState`, or one `RequestError` that says what is wrong.

Runs on the submitting thread, so a bad request never reaches the engine loop.
"""

from __future__ import annotations

import operator
import secrets
import time
from collections.abc import Iterable, Mapping, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from lamella_core.errors import RequestError
from lamella_core.prefix import PrefixRule
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.sequence import RequestState, Sequence, TextDecoder

MAX_BAD_WORDS = 1024  # token sequences of one request
MAX_BAD_WORD_TOKENS = 256


@dataclass(frozen=True)
class EngineLimits:
    """What bounds every request of one engine."""

    vocab_size: int
    max_seq_len: int  # prompt and generated tokens of one sequence
    max_batch_size: int  # samples computed in one step
    max_num_tokens: int  # tokens computed in one step
    max_beam_width: int = 1
    max_input_len: int | None = None  # prompt tokens; None: max_seq_len - 1
    eos_token_ids: tuple[int, ...] = ()
    max_output_len: int | None = None  # generated tokens; None: what max_seq_len leaves
    prefix_rule: PrefixRule | None = None  # what part of a prompt is read in both directions


def make_request(
    request_id: int,
    prompt_token_ids: SequenceOf[int],
    params: SamplingParams,
    limits: EngineLimits,
    *,
    decoder: TextDecoder | None = None,
    bad_words_ids: Iterable[SequenceOf[int]] = (),
) -> RequestState:
    """Checks one request against the engine's limits and makes its state. The scheduler's `check_fits` completes it.

    ``max_tokens`` is clipped to what ``max_seq_len`` leaves after the prompt; such a request ends with finish_reason
    "length". ``truncate_prompt_tokens`` keeps the last tokens of the prompt.

    Raises:
        RequestError: names the field, its value, what is allowed and what to do.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params is a {type(params).__name__}; pass a SamplingParams")
    prompt = check_token_ids("prompt_token_ids", prompt_token_ids, limits.vocab_size)
    if params.truncate_prompt_tokens is not None:
        prompt = prompt[-params.truncate_prompt_tokens :]
    _check_prompt(prompt, limits)
    _check_params(params, limits, decoder)
    bad_words = tuple(
        tuple(check_token_ids(f"bad_words_ids[{i}]", word, limits.vocab_size)) for i, word in enumerate(bad_words_ids)
    )
    _check_bad_words(params, bad_words)
    eos = _end_ids(params, limits)
    return RequestState(
        request_id=request_id,
        params=params,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        end_id=eos[0] if eos else None,
        extra_end_ids=eos[1:],
        max_tokens=min(params.max_tokens, limits.max_seq_len - len(prompt)),
        sequences=[_sequence(prompt, limits.prefix_rule, decoder)],
        arrival_s=time.monotonic(),
        prompt_logprobs=[None] if params.prompt_logprobs is not None else [],  # the first token has none
        bad_words_ids=bad_words,
    )


def _sequence(prompt: list[int], rule: PrefixRule | None, decoder: TextDecoder | None) -> Sequence:
    sequence = Sequence(index=0, token_ids=prompt, num_prompt_tokens=len(prompt), decoder=decoder)
    if rule is not None:
        prefix = rule.of(prompt)
        sequence.num_prefix_tokens, sequence.mask_place = prefix.num_tokens, prefix.mask_place
    return sequence


def _end_ids(params: SamplingParams, limits: EngineLimits) -> tuple[int, ...]:
    if params.ignore_eos or params.end_id == -1:
        return ()
    if params.end_id is not None:
        return (params.end_id,)
    return tuple(token for token in limits.eos_token_ids if 0 <= token < limits.vocab_size)  # others never come


def check_token_ids(name: str, ids: SequenceOf[int], vocab_size: int) -> list[int]:
    """Returns the ids as a new list of ints; numpy and torch integers are accepted.

    Raises:
        RequestError: they are no integers, or not below ``vocab_size``; ``name`` is named.
    """
    if isinstance(ids, str | bytes):
        raise RequestError(f"{name} is a {type(ids).__name__}; it must be token ids. Tokenize the text, or use LLM")
    if isinstance(ids, Set | Mapping):
        raise RequestError(f"{name} is a {type(ids).__name__}, which has no order; it must be a list of token ids")
    try:
        ids = list(ids)
        kinds = set(map(type, ids))
        if bool in kinds:
            raise TypeError("a bool is no token id")
        out = ids if kinds == {int} else [operator.index(token) for token in ids]
    except TypeError as error:
        raise RequestError(f"{name} must be a sequence of integers, not of {_kind(ids)} ({error})") from None
    if out and not (0 <= min(out) and max(out) < vocab_size):
        position = next(i for i, token in enumerate(out) if not 0 <= token < vocab_size)
        raise RequestError(
            f"{name}[{position}] is {out[position]}; token ids must be in 0..{vocab_size - 1} "
            f"(vocab_size {vocab_size}). Was another model's tokenizer used?"
        )
    return out


def _kind(ids: object) -> str:
    try:
        return next((type(i).__name__ for i in ids if type(i) is not int), "nothing")  # type: ignore[attr-defined]
    except TypeError:
        return type(ids).__name__


def _check_prompt(prompt: list[int], limits: EngineLimits) -> None:
    if not prompt:
        raise RequestError("prompt_token_ids is empty; at least one token is needed (for example the bos token)")
    longest = limits.max_seq_len - 1
    if limits.max_input_len is not None:
        longest = min(longest, limits.max_input_len)
    if len(prompt) > longest:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; at most {longest} are allowed (max_seq_len {limits.max_seq_len}, "
            f"one of them generated; max_input_len {limits.max_input_len}). Shorten it, set "
            "SamplingParams.truncate_prompt_tokens, or build with a larger max_seq_len"
        )


def _check_params(params: SamplingParams, limits: EngineLimits, decoder: TextDecoder | None) -> None:
    if limits.max_output_len is not None and params.max_tokens > limits.max_output_len:
        raise RequestError(
            f"SamplingParams.max_tokens is {params.max_tokens}; this engine was built with kv_cache_type='disabled' "
            f"and computes prompts only: set max_tokens={limits.max_output_len}, or build with kv_cache_type='paged'"
        )
    if params.stop and decoder is None:
        raise RequestError(
            f"SamplingParams.stop is {params.stop!r}, but there is no decoder to make text; pass decoder=, use LLM "
            "with a tokenizer, or use stop_token_ids"
        )
    vocab = limits.vocab_size
    check_token_ids("SamplingParams.stop_token_ids", params.stop_token_ids or (), vocab)
    check_token_ids("SamplingParams.bad_token_ids", params.bad_token_ids or (), vocab)
    if params.end_id is not None and params.end_id >= vocab:
        raise RequestError(
            f"SamplingParams.end_id is {params.end_id}; it must be in 0..{vocab - 1} (vocab_size {vocab}), -1 for "
            "none, or None for the model's"
        )
    bias = params.embedding_bias
    if bias is not None and bias.shape[0] != vocab:
        raise RequestError(
            f"SamplingParams.embedding_bias has {bias.shape[0]} entries; it needs vocab_size, {vocab}, one per token"
        )


def _check_bad_words(params: SamplingParams, bad_words: tuple[tuple[int, ...], ...]) -> None:
    if params.bad and not bad_words:
        raise RequestError(
            f"SamplingParams.bad is {params.bad!r}, but no token ids were given for it; pass bad_words_ids=, or use "
            "LLM with a tokenizer"
        )
    if len(bad_words) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words_ids has {len(bad_words)} entries; at most {MAX_BAD_WORDS} are allowed")
    for word in bad_words:
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
            raise RequestError(f"bad_words_ids: an entry has {len(word)} tokens; allowed: 1 to {MAX_BAD_WORD_TOKENS}")
