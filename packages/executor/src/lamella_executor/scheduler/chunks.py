"""Which tokens of one request go next: chunks, the lockstep of its sequences, and the logits they need."""

from __future__ import annotations

from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.sequence import RequestState, Sequence


def least_chunk(sequence: Sequence, *, is_whole: bool) -> int:
    """Returns how many of its next tokens a sequence computes at least, if it has any to compute.

    Args:
        sequence: of which some tokens may be computed.
        is_whole: it is a prompt that may not be chunked.
    """
    if is_whole:
        return sequence.num_tokens - sequence.num_computed_tokens
    return max(1, sequence.num_prefix_tokens - sequence.num_computed_tokens)  # a prefix sees all of itself at once


def plan_chunks(
    request: RequestState, kv: KvCacheManager, budget: int, limit: int, *, is_whole: bool
) -> list[tuple[Sequence, int]]:
    """Returns how many of its next tokens each sequence computes; empty if the budget does not allow any progress.

    The last tokens of all sequences come together. Until then each catches up on its own, which only happens after a
    pause: one after the other, so that a later one starts on what an earlier one has computed (`_adopt_prefix`).

    Args:
        request: a running request.
        kv: its block tables.
        budget: rows left in the step.
        limit: tokens of one sequence at most.
        is_whole: all or nothing, for a prompt that may not be chunked; a prefix never is.
    """
    sequences = request.sequences
    if len(sequences) == 1:
        pending = sequences[0].num_tokens - sequences[0].num_computed_tokens
        num_tokens = min(pending, budget, limit)
        is_enough = num_tokens >= least_chunk(sequences[0], is_whole=is_whole)
        return [(sequences[0], num_tokens)] if num_tokens and is_enough else []
    chunks: list[tuple[Sequence, int]] = []
    is_behind = False
    for i, sequence in enumerate(sequences):
        if i and not sequence.blocks:
            if is_behind:
                break
            _adopt_prefix(sequence, sequences[:i], kv)
        missing = sequence.num_tokens - 1 - sequence.num_computed_tokens
        is_behind = is_behind or missing > 0
        num_tokens = min(missing, budget, limit)
        if num_tokens > 0 and num_tokens >= least_chunk(sequence, is_whole=False):
            chunks.append((sequence, num_tokens))
            budget -= num_tokens
    if not is_behind and len(sequences) <= budget:
        return [(sequence, 1) for sequence in sequences]
    return chunks


def num_logits(request: RequestState, sequence: Sequence, start: int, num_tokens: int) -> int:
    """Returns how many last rows of tokens [start, start + num_tokens) need logits: none, the last, or all.

    The row of position p predicts position p + 1. Prompt positions 1 .. num_prompt_tokens - 1 need theirs when the
    request asks for prompt log-probabilities and does not have them yet.
    """
    end = start + num_tokens
    if request.params.prompt_logprobs is not None:
        num_done, num_prompt = len(request.prompt_logprobs), sequence.num_prompt_tokens
        first_needed = max(num_done - 1, 0)
        if num_done < num_prompt and start < num_prompt - 1 and end > first_needed:
            return num_tokens
    return 1 if end == len(sequence.token_ids) else 0


def _adopt_prefix(sequence: Sequence, siblings: list[Sequence], kv: KvCacheManager) -> None:
    """Starts a sequence on the longest common prefix that one of its siblings has computed."""

    def common(sibling: Sequence) -> int:
        return min(_num_common(sequence.token_ids, sibling.token_ids), sibling.num_computed_tokens)

    best = max(siblings, key=common)
    num_tokens = min(common(best), sequence.num_tokens - 1)
    if num_tokens > 0:
        kv.share_prefix(best, sequence, num_tokens)


def _num_common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix, by bisection over slice comparisons."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
