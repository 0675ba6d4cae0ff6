"""SamplingParams: what one request asks for. Validated when made; frozen afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from lamella_core.errors import RequestError

MAX_WIDTH = 128  # n and best_of
MAX_BEAM_WIDTH = 8
MAX_STOPS = 64  # stop strings, and stop token ids
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 100


class LogitsProcessor(Protocol):
    """Edits the logits of one request in place before sampling.

    Called with the request id, ``logits`` [num_sequences, vocab_size] float32, ``token_ids`` (prompt and generated, one
    list per sequence), and two values kept for callers written against older APIs: ``stream_ptr`` (None on a CPU) and
    ``client_id`` (None). An exception fails this request only.
    """

    def __call__(
        self,
        req_id: int,
        logits: torch.Tensor,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None,
    ) -> None: ...


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str | int) else tuple(value)


def _bad(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"SamplingParams.{name} is {value!r}; {allowed}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Length, stops, sampling, penalties and what to return.

    Decoding is greedy when none of temperature, top_k, top_p and min_p is set, or when temperature is 0. Beam search is
    chosen by ``use_beam_search``; its width is ``best_of`` (default ``n``), at most 8.

    Raises:
        RequestError: a value out of range or two fields that contradict each other; the message names them.
    """

    # length and ends
    max_tokens: int = 32  # generated tokens at most
    min_tokens: int = 0  # no end of sequence or stop before this many
    end_id: int | None = None  # end-of-sequence token; None: the model's
    pad_id: int | None = None  # accepted for callers of older APIs; packed batches have no padding
    ignore_eos: bool = False
    truncate_prompt_tokens: int | None = None  # keep only this many last prompt tokens
    stop: str | Sequence[str] | None = None  # strings; need a tokenizer
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
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
    embedding_bias: torch.Tensor | None = None  # [vocab_size] float32, added to the logits
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None
    # what comes back
    logprobs: int | None = None  # top log-probabilities per generated token; 0: the chosen token's only
    prompt_logprobs: int | None = None
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    _edits_logits: bool = field(init=False, repr=False, compare=False, default=False)
    _is_plain_greedy: bool = field(init=False, repr=False, compare=False, default=False)

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad", "bad_token_ids"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        processors = self.logits_processor
        if processors is not None and not isinstance(processors, list | tuple):
            processors = (processors,)
        object.__setattr__(self, "logits_processor", tuple(processors or ()))
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(getattr(self, name), bool):
                object.__setattr__(self, name, 1 if getattr(self, name) else None)
        self._check_counts()
        self._check_floats()
        self._check_lists()
        self._check_contradictions()
        edits = (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.no_repeat_ngram_size > 0
            or bool(self.bad_token_ids)
            or self.embedding_bias is not None
            or bool(self.logits_processor)
        )
        is_plain = self.is_greedy and not edits and self.logprobs is None and self.min_tokens == 0
        object.__setattr__(self, "_edits_logits", edits)
        object.__setattr__(self, "_is_plain_greedy", is_plain)

    @property
    def width(self) -> int:
        """Sequences generated: samples or beams."""
        return self.best_of if self.best_of is not None else self.n

    @property
    def is_greedy(self) -> bool:
        if self.use_beam_search or self.temperature == 0:
            return not self.use_beam_search
        return all(v is None for v in (self.temperature, self.top_k, self.top_p, self.min_p))

    @property
    def edits_logits(self) -> bool:
        """Whether penalties, bans, a bias or processors change the logits (beside min_tokens and tokenized bad words)."""
        return self._edits_logits

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is just the argmax of the logits, and nothing else is asked for."""
        return self._is_plain_greedy

    def replace(self, **changes: Any) -> SamplingParams:
        """Returns a validated copy with some fields changed."""
        return replace(self, **changes)

    def _check_counts(self) -> None:
        least = {
            "max_tokens": 1, "min_tokens": 0, "n": 1, "best_of": 1, "top_k": 0, "no_repeat_ngram_size": 0, "logprobs": 0,
            "prompt_logprobs": 0, "truncate_prompt_tokens": 1, "end_id": -1, "pad_id": -1, "seed": None,
        }  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise _bad(name, value, "it must be an integer")
            if minimum is not None and value < minimum:
                raise _bad(name, value, f"it must be at least {minimum}")
        for name, most in {"n": MAX_WIDTH, "best_of": MAX_WIDTH, "logprobs": MAX_LOGPROBS, "prompt_logprobs": MAX_LOGPROBS}.items():  # fmt: skip
            if (getattr(self, name) or 0) > most:
                raise _bad(name, getattr(self, name), f"it must be at most {most}")

    def _check_floats(self) -> None:
        ranges = {
            "temperature": (0.0, math.inf), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (0.0, math.inf),
            "presence_penalty": (-math.inf, math.inf), "frequency_penalty": (-math.inf, math.inf),
            "beam_search_diversity_rate": (0.0, math.inf), "length_penalty": (-math.inf, math.inf),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise _bad(name, value, "it must be a finite number")
            if not low <= value <= high:
                raise _bad(name, value, f"it must be between {low} and {high}")
        if self.repetition_penalty == 0:
            raise _bad("repetition_penalty", 0, "it must be above 0 (1 means none)")

    def _check_lists(self) -> None:
        for name in ("stop", "bad", "stop_token_ids", "bad_token_ids"):
            values = getattr(self, name)
            if len(values) > MAX_STOPS:
                raise RequestError(f"SamplingParams.{name} has {len(values)} entries; at most {MAX_STOPS} are allowed")
            kind = str if name in ("stop", "bad") else int
            for value in values:
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise _bad(name, value, f"every entry must be {'a string' if kind is str else 'a token id'}")
                if kind is str and not 0 < len(value) <= MAX_STOP_CHARS:
                    raise _bad(name, value, f"every string must have 1 to {MAX_STOP_CHARS} characters")
        for processor in self.logits_processor:  # type: ignore[union-attr]
            if not callable(processor):
                raise _bad("logits_processor", processor, "it must be callable")
        bias = self.embedding_bias
        if bias is not None and not (
            isinstance(bias, torch.Tensor) and bias.dim() == 1 and bool(torch.isfinite(bias).all())
        ):
            raise RequestError("SamplingParams.embedding_bias must be a 1-d tensor of finite numbers, [vocab_size]")

    def _check_contradictions(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"it exceeds max_tokens {self.max_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise _bad("best_of", self.best_of, f"it must be at least n ({self.n})")
        if self.early_stopping not in (True, False, "never"):
            raise _bad("early_stopping", self.early_stopping, 'allowed: True, False, "never"')
        if self.use_beam_search:
            self._check_beam()
            return
        if self.is_greedy and self.width > 1:
            raise RequestError(
                f"SamplingParams: n={self.n}, best_of={self.best_of} with greedy decoding would return the same text "
                "several times; set temperature (or top_k, top_p, min_p), or use_beam_search=True"
            )
        defaults = {"beam_search_diversity_rate": 0.0, "early_stopping": False}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise _bad(name, getattr(self, name), "it needs use_beam_search=True")

    def _check_beam(self) -> None:
        if self.width > MAX_BEAM_WIDTH:
            raise _bad("best_of", self.width, f"the beam width must be at most {MAX_BEAM_WIDTH}")
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if getattr(self, name) not in (None, 0 if name == "temperature" else None):
                raise _bad(name, getattr(self, name), "beam search does not sample; leave it unset")

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if f.name != "embedding_bias")
        changed = (f"{f.name}={getattr(self, f.name)!r}" for f in shown if getattr(self, f.name) not in (f.default, ()))
        return f"SamplingParams({', '.join(changed)})"
