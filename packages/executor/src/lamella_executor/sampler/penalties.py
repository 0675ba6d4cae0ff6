"""Penalties and bans on the logits of one request, before any filter.

Order: repetition penalty, frequency and presence penalty, no_repeat_ngram_size, bad tokens and bad words, min_tokens,
embedding_bias, then the user's logits processors. Repetition and n-grams look at prompt and output (as transformers
does), presence and frequency at the output only (as the OpenAI API does). A banned token has the score -inf.

Sampling edits raw logits; beam search edits log-probabilities, as transformers does. Nothing is remembered from step to
step: every edit is computed from the tokens, so it is the same after pause and resume.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from lamella_executor.sampler.processors import run_processors
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.sequence import RequestState, Sequence

_BANNED = -float("inf")


def has_edits(request: RequestState) -> bool:
    """Whether `edit_logits` would change anything for this request in this step."""
    params = request.params
    if params.edits_logits or request.bad_words_ids:
        return True
    return any(sequence.num_output_tokens < params.min_tokens for sequence in request.sequences)


def edit_logits(scores: torch.Tensor, request: RequestState) -> None:
    """Applies everything above, in place.

    Args:
        scores: [len(request.sequences), vocab_size] float32.
        request: whose sequences the rows belong to, in order.

    Raises:
        RequestError: a logits processor raised.
    """
    params = request.params
    for row, sequence in zip(scores.unbind(0), request.sequences, strict=True):
        _penalize(row, sequence, params)
        banned = _banned_tokens(sequence, request)
        if banned:
            row[torch.tensor(banned, device=row.device)] = _BANNED
    if params.embedding_bias is not None:
        scores += params.embedding_bias.to(scores.device)
    if params.processors:
        run_processors(scores, request)


def _penalize(row: torch.Tensor, sequence: Sequence, params: SamplingParams) -> None:
    if params.repetition_penalty != 1.0:
        repetition_penalty(row, sequence.token_ids, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        count_penalties(row, sequence.output_ids, params.presence_penalty, params.frequency_penalty)


def _banned_tokens(sequence: Sequence, request: RequestState) -> list[int]:
    """Returns the tokens that may not come next (with repetitions)."""
    params = request.params
    banned = list(params.bad_ids)
    if params.no_repeat_ngram_size:
        banned += repeated_ngram_tokens(sequence.token_ids, params.no_repeat_ngram_size)
    if request.bad_words_ids:
        banned += bad_word_tokens(sequence.token_ids, request.bad_words_ids)
    if sequence.num_output_tokens < params.min_tokens:
        banned += params.stop_ids
        banned += request.extra_end_ids
        banned += () if request.end_id is None else (request.end_id,)
    return banned


def repetition_penalty(row: torch.Tensor, token_ids: list[int], penalty: float) -> None:
    """Divides the positive and multiplies the negative scores of the given tokens by ``penalty``, in place.

    Keskar et al., "CTRL" (2019), with the usual treatment of negative scores.
    """
    ids = torch.tensor(token_ids, device=row.device)
    seen = row[ids]
    row[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def count_penalties(row: torch.Tensor, output_ids: list[int], presence: float, frequency: float) -> None:
    """Subtracts ``presence`` once, and ``frequency`` per occurrence, from every token of the output, in place."""
    if not output_ids:
        return
    ids, counts = torch.tensor(output_ids, device=row.device).unique(return_counts=True)
    row[ids] -= counts * frequency + presence


def repeated_ngram_tokens(token_ids: list[int], size: int) -> list[int]:
    """Returns the tokens that would make the last ``size`` tokens equal to some earlier ``size`` tokens."""
    if len(token_ids) < size:
        return []
    tokens = np.array(token_ids)
    is_repeat = np.ones(len(tokens) - size + 1, dtype=bool)  # of the n-gram that starts here
    for offset in range(size - 1):
        is_repeat &= tokens[offset : offset + len(is_repeat)] == tokens[len(tokens) - size + 1 + offset]
    return np.unique(tokens[size - 1 :][is_repeat]).tolist()


def bad_word_tokens(token_ids: list[int], words: Iterable[tuple[int, ...]]) -> list[int]:
    """Returns the last tokens of those words (token sequences) whose other tokens end the sequence."""
    out = []
    for word in words:
        prefix = list(word[:-1])
        if not prefix or token_ids[-len(prefix) :] == prefix:
            out.append(word[-1])
    return out
