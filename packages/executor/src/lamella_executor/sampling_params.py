"""SamplingParams: what one request asks for. Validated when made; frozen afterwards."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from lamella_core.errors import RequestError

MAX_WIDTH = 128  # n and best_of
MAX_BEAM_WIDTH = 8
MAX_STOPS = 64  # stop strings, bad strings, stop token ids, logits processors
MAX_STOP_CHARS = 256
MAX_BAD_TOKENS = 1024
MAX_LOGPROBS = 100

_T = TypeVar("_T", int, float)

_LISTS = ("stop", "stop_token_ids", "bad", "bad_token_ids", "logits_processor")
_COUNTS: dict[str, tuple[float, float]] = {  # integer fields: least and most
    "max_tokens": (1, math.inf), "min_tokens": (0, math.inf), "truncate_prompt_tokens": (1, math.inf),
    "end_id": (-1, math.inf), "pad_id": (-1, math.inf), "seed": (-math.inf, math.inf),
    "n": (1, MAX_WIDTH), "best_of": (1, MAX_WIDTH), "top_k": (0, math.inf), "no_repeat_ngram_size": (0, math.inf),
    "logprobs": (0, MAX_LOGPROBS), "prompt_logprobs": (0, MAX_LOGPROBS),
}  # fmt: skip
_NUMBERS: dict[str, tuple[float, float]] = {  # float fields: least and most
    "temperature": (0.0, math.inf), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6), "presence_penalty": (-1e6, 1e6), "frequency_penalty": (-1e6, 1e6),
    "beam_search_diversity_rate": (0.0, 1e6), "length_penalty": (-10.0, 10.0),
}  # fmt: skip
_BEAM_ONLY = ("beam_search_diversity_rate", "length_penalty", "early_stopping")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class LogitsProcessor(Protocol):
    """Edits the logits of one request in place before sampling.

    Called with the request id, ``logits`` [1, num_sequences, vocab_size] float32 (beam search: log-probabilities),
    ``token_ids`` (prompt and generated, one list per sequence), and two values kept for callers written against older
    APIs: ``stream_ptr`` (None on a CPU) and ``client_id`` (None). What it returns is ignored. An exception fails this
    request only.
    """

    def __call__(
        self,
        req_id: int,
        logits: torch.Tensor,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)  # has its own __eq__: a tensor's is elementwise
class SamplingParams:
    """Length, stops, sampling, penalties and what to return.

    Decoding is greedy when none of temperature, top_k, top_p and min_p is set, when temperature or top_p is 0, and when
    top_k is 1. Beam search is chosen by ``use_beam_search``; its width is ``best_of`` (default ``n``), at most 8.

    Lists may be given as one value or any iterable; they are kept as tuples. None stands for the default of a field.

    Raises:
        RequestError: a value out of range or two fields that contradict each other; the message names them.
    """

    # length and ends
    max_tokens: int = 32  # generated tokens at most
    min_tokens: int = 0  # no end of sequence or stop before this many
    end_id: int | None = None  # end-of-sequence token; None: the model's; -1: none
    pad_id: int | None = None  # accepted for callers of older APIs; packed batches have no padding
    ignore_eos: bool = False
    truncate_prompt_tokens: int | None = None  # keep only this many last prompt tokens
    stop: str | Sequence[str] | None = None  # strings; need a tokenizer
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False  # keep the stop string or stop token in the output
    bad: str | Sequence[str] | None = None  # words that must not be generated; need a tokenizer
    bad_token_ids: Sequence[int] | None = None
    # how many
    n: int = 1
    best_of: int | None = None  # candidates generated; the n best by cumulative log-probability are returned
    use_beam_search: bool = False
    beam_search_diversity_rate: float = 0.0  # subtracted per sibling rank (Li and Jurafsky 2016)
    length_penalty: float = 1.0  # a hypothesis scores cumulative_logprob / length ** length_penalty
    early_stopping: bool | str = False  # True | False | "never"
    # sampling
    temperature: float | None = None
    top_k: int | None = None  # 0: all
    top_p: float | None = None
    min_p: float | None = None  # tokens below min_p times the best one's probability are dropped
    seed: int | None = None
    # penalties
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    embedding_bias: torch.Tensor | None = None  # [vocab_size] float32, added to the logits; -inf bans a token
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None
    # what comes back
    logprobs: int | None = None  # top log-probabilities per generated token; 0: the chosen token's only; True: 1
    prompt_logprobs: int | None = None
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for field in fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, field.default)
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(getattr(self, name), bool):
                object.__setattr__(self, name, 1 if getattr(self, name) else None)
        if isinstance(self.early_stopping, int):
            object.__setattr__(self, "early_stopping", bool(self.early_stopping))
        self._check_numbers()
        self._check_lists()
        self._check_bias()
        self._check_contradictions()

    def replace(self, **changes: Any) -> SamplingParams:
        """Returns a validated copy with some fields changed."""
        return replace(self, **changes)

    @property
    def width(self) -> int:
        """Sequences generated: samples or beams."""
        return self.best_of if self.best_of is not None else self.n

    @cached_property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken at every step."""
        if self.use_beam_search:
            return False
        if self.temperature == 0 or self.top_p == 0 or self.top_k == 1:
            return True
        return all(getattr(self, name) is None for name in _SAMPLING)

    @cached_property
    def edits_logits(self) -> bool:
        """Whether anything changes the logits of every step (min_tokens and tokenized bad words are not counted)."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.no_repeat_ngram_size > 0
            or bool(self.bad_ids)
            or self.embedding_bias is not None
            or bool(self.logits_processor)
        )

    @cached_property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is just the argmax of the logits, and nothing else is asked for."""
        return self.is_greedy and not self.edits_logits and self.logprobs is None and self.min_tokens == 0

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        return _as_tuple("stop", self.stop)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(_as_tuple("stop_token_ids", self.stop_token_ids))

    @cached_property
    def bad_ids(self) -> tuple[int, ...]:
        return _as_tuple("bad_token_ids", self.bad_token_ids)

    @cached_property
    def processors(self) -> tuple[LogitsProcessor, ...]:
        return _as_tuple("logits_processor", self.logits_processor)

    def _check_numbers(self) -> None:
        for field in fields(self):
            is_flag = isinstance(field.default, bool) and field.name != "early_stopping"
            if is_flag and not isinstance(getattr(self, field.name), bool):
                raise _bad(field.name, getattr(self, field.name), "it must be True or False")
        for name, (least, most) in _COUNTS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _integer(name, value, least, most))
        for name, (least, most) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(name, value, least, most))
        if self.early_stopping not in (True, False, "never"):
            raise _bad("early_stopping", self.early_stopping, 'allowed: True, False, "never"')

    def _check_lists(self) -> None:
        for name in _LISTS:
            values: tuple[Any, ...] = getattr(self, name)
            most = MAX_BAD_TOKENS if name == "bad_token_ids" else MAX_STOPS
            if len(values) > most:
                raise RequestError(f"SamplingParams.{name} has {len(values)} entries; at most {most} are allowed")
            if name in ("stop", "bad"):
                for value in values:
                    _check_string(name, value)
            elif name == "logits_processor":
                for value in values:
                    if not callable(value):
                        raise _bad(name, value, "it must be callable")
            else:
                object.__setattr__(self, name, tuple(_integer(name, value, 0, math.inf) for value in values))

    def _check_bias(self) -> None:
        """Keeps a float32 copy of the bias, so that the caller's tensor may change."""
        if self.embedding_bias is None:
            return
        try:
            bias = torch.as_tensor(self.embedding_bias).detach()
            if bias.is_complex():
                raise TypeError("complex numbers")
            bias = bias.to("cpu", torch.float32, copy=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RequestError(
                f"SamplingParams.embedding_bias is no tensor of numbers, [vocab_size]: {error}"
            ) from error
        if bias.dim() != 1 or bias.numel() == 0 or bool((torch.isnan(bias) | torch.isposinf(bias)).any()):
            raise RequestError(
                f"SamplingParams.embedding_bias has shape {list(bias.shape)}; it must be [vocab_size], no NaN or +Inf"
            )
        object.__setattr__(self, "embedding_bias", bias)

    def _check_contradictions(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"it exceeds max_tokens {self.max_tokens}; lower it")
        if self.best_of is not None and self.best_of < self.n:
            raise _bad("best_of", self.best_of, f"it must be at least n ({self.n})")
        if self.stop and not self.detokenize:
            raise _bad(
                "stop", self.stop, "stop strings are found in the text; set detokenize=True or use stop_token_ids"
            )
        if self.use_beam_search:
            if self.width > MAX_BEAM_WIDTH:
                raise _bad("best_of" if self.best_of else "n", self.width, f"beams: at most {MAX_BEAM_WIDTH}")
            for name in _SAMPLING:
                if getattr(self, name) is not None and not (name == "temperature" and self.temperature == 0):
                    raise _bad(name, getattr(self, name), "beam search does not sample; leave it unset")
            return
        if self.is_greedy and self.width > 1:
            raise RequestError(
                f"SamplingParams: n={self.n}, best_of={self.best_of} with greedy decoding would return the same text "
                "several times; set temperature (or top_k, top_p, min_p), or use_beam_search=True"
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in _BEAM_ONLY:
            if getattr(self, name) != defaults[name]:
                raise _bad(name, getattr(self, name), "it needs use_beam_search=True")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingParams):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(torch.equal(a, b) if _are_tensors(a, b) else a is b or a == b for a, b in pairs)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self) if f.name != "embedding_bias"))

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if f.name != "embedding_bias")
        changed = (f"{f.name}={getattr(self, f.name)!r}" for f in shown if getattr(self, f.name) not in (f.default, ()))
        return f"SamplingParams({', '.join(changed)})"


def _are_tensors(*values: object) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values)


def _bad(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"SamplingParams.{name} is {reprlib.repr(value)}; {allowed}")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Returns the values of a list field; one value alone is a list of one."""
    if value is None:
        return ()
    if isinstance(value, str | numbers.Integral) or (name == "logits_processor" and callable(value)):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, bytes | dict):
        raise _bad(name, value, "it must be one value or a list of them")
    return tuple(value)


def _integer(name: str, value: Any, least: float, most: float) -> int:
    """Returns ``value``, maybe a numpy integer, as an int within bounds."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _bad(name, value, "it must be an integer")
    return _within(name, int(value), least, most)


def _number(name: str, value: Any, least: float, most: float) -> float:
    """Returns ``value``, maybe a numpy number, as a finite float within bounds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise _bad(name, value, "it must be a finite number")
    return _within(name, float(value), least, most)


def _within(name: str, value: _T, least: float, most: float) -> _T:
    if not least <= value <= most:
        raise _bad(name, value, f"it must be at {f'least {least}' if value < least else f'most {most}'}")
    return value


def _check_string(name: str, value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_STOP_CHARS:
        raise _bad(name, value, f"every entry must be a string of 1 to {MAX_STOP_CHARS} characters")
