"""The state of a request inside the engine. Only the engine loop's thread writes it.

A request advances: each of its sequences has ``token_ids`` (prompt and generated) and ``num_computed_tokens`` of them
in the KV cache; a sequence is sampled in the step that computes its last token. There is no prefill or decode phase.

A request starts with one sequence; after the prompt it forks into ``best_of`` samples or beams. The last tokens of all
its live sequences are computed in the same step (earlier tokens may be chunked), so sampling always sees all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from lamella_executor.sampling_params import SamplingParams


class TextDecoder(Protocol):
    """Turns one sequence's tokens into text as they come; made by whoever owns a tokenizer, one per sequence."""

    @property
    def text(self) -> str:
        """The text decoded so far; never ends in half a character."""
        ...

    def push(self, token_id: int) -> None:
        """Appends one generated token."""
        ...

    def finish(self) -> None:
        """Flushes what was held back because it could have been half a character."""
        ...

    def fork(self) -> TextDecoder:
        """Returns an independent copy."""
        ...


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of a token and its 1-based rank in the vocabulary at that position."""

    logprob: float
    rank: int | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One token sequence of a request, and its place in the KV cache."""

    index: int  # which sample or beam of the request
    token_ids: list[int]  # prompt, then generated
    num_prompt_tokens: int
    num_computed_tokens: int = 0  # leading tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)  # block table; EVICTED_BLOCK where the window has passed
    state_slot: int = -1  # where its recurrent state lies, in models that have one; -1: nowhere
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # one per generated token, if asked for
    decoder: TextDecoder | None = None
    text_ends: list[int] = field(default_factory=list)  # by StopChecker: len(decoder.text) after each generated token
    text_limit: int | None = None  # by StopChecker: characters of decoder.text that are output; None: all
    finish_reason: str | None = None  # None while it runs; "stop" | "length"
    stop_reason: int | str | None = None  # the stop token id or string that ended it
    num_prefix_tokens: int = 0  # of the prompt: those that all see each other; not 0 only if the model has prefixes
    mask_place: int = 0  # then, the position that what follows them fills in for

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def text(self) -> str:
        """The output text: what was decoded, up to the stop string that ended it; "" without a decoder."""
        return self.decoder.text[: self.text_limit] if self.decoder is not None else ""

    def fork(self, index: int) -> Sequence:
        """Returns a copy with no blocks; the KV cache manager shares the parent's blocks with it."""
        return Sequence(
            index=index,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=self.num_computed_tokens,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=list(self.logprobs),
            decoder=self.decoder.fork() if self.decoder is not None else None,
            text_ends=list(self.text_ends),
            num_prefix_tokens=self.num_prefix_tokens,
            mask_place=self.mask_place,
        )


EVICTED_BLOCK = -1  # in Sequence.blocks: the block left the attention window and was given back
PENDING_TOKEN = -1  # in Sequence.token_ids, last: sampled by a launched step whose results are still on the device


@dataclass(eq=False, slots=True)
class RequestState:
    """One user request while the engine holds it."""

    request_id: int
    params: SamplingParams
    seed: int  # resolved: the user's, or drawn when the request was made
    end_id: int | None  # resolved end-of-sequence token; None when EOS is ignored or unknown
    max_tokens: int  # resolved: generated tokens at most, after clipping to max_seq_len
    sequences: list[Sequence]  # live ones, in index order
    arrival_s: float  # time.monotonic()
    finished: list[Sequence] = field(default_factory=list)  # ended ones; for beams, the hypotheses
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)  # entry 0 is None
    num_pauses: int = 0
    num_reused_tokens: int = 0  # prompt tokens found in the prefix cache
    first_scheduled_s: float | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # params.bad as token sequences that must not be generated
    extra_end_ids: tuple[int, ...] = ()  # further end-of-sequence tokens of the model; treated as end_id is
    beam: object | None = None  # sampler.beam.BeamState of a beam request, made by the sampler
    device_sampled: bool | None = None  # by sampler.device.is_device_sampled, which see; None: not asked yet

    @property
    def num_prompt_tokens(self) -> int:
        first = self.sequences[0] if self.sequences else self.finished[0]
        return first.num_prompt_tokens

    @property
    def width(self) -> int:
        """Sequences this request has after its prompt: samples or beams."""
        return self.params.width

    @property
    def slots(self) -> int:
        """How much of max_batch_size it takes: a sample each; a beam request takes one whatever its width."""
        return 1 if self.params.use_beam_search else self.width
