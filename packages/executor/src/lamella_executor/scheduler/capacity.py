"""CapacityModel: how many KV blocks a request needs: now, at worst, and still to come.

Bounds, not guesses. Without an attention window a request's sequences share the whole blocks of its prompt and may
differ in all others; its last generated token is never computed, so it holds at most prompt + max_tokens - 1 tokens.
With a window each sequence holds the sinks, the window and the chunk being computed, and nothing is counted as shared
(blocks that one holder has evicted may still be held by another). Nor is it where sequences have recurrent states:
after a pause each computes its prompt by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.scheduler.chunks import least_chunk
from lamella_executor.sequence import RequestState


class CapacityModel:
    """Block arithmetic for the capacity policies.

    Args:
        kv: the cache to fit into.
        max_batch_size: `RequestState.slots` of all running requests at most.
        max_num_tokens: rows of a step.
        is_chunked: prompts may be split over steps.
    """

    def __init__(self, kv: KvCacheManager, max_batch_size: int, max_num_tokens: int, *, is_chunked: bool) -> None:
        self.kv = kv
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self._is_chunked = is_chunked
        self._shares = kv.window is None and not kv.num_state_slots  # forks share their prompt's blocks, always
        self._window_blocks = 0  # what one sequence holds while it computes a single token
        if kv.window is not None:
            self._window_blocks = kv.num_sink_blocks + kv.blocks_for(kv.window - 1) + 1

    def is_whole(self, request: RequestState) -> bool:
        """Its next chunk is all or nothing: a prompt that may not be split (what is recomputed may be)."""
        if self._is_chunked or request.finished:
            return False
        return request.sequences[0].num_output_tokens == 0

    def least_chunk(self, request: RequestState) -> int:
        """Tokens that a step must have room for if the first of its sequences is to go on."""
        return least_chunk(request.sequences[0], is_whole=self.is_whole(request))

    def max_chunk(self, request: RequestState) -> int:
        """Tokens of one of its sequences in one step at most."""
        if self.kv.window is None or self.is_whole(request):
            return self.max_num_tokens
        # With a window, a chunk is what remains of the cache beside the windows of all its sequences.
        num_spare = self.kv.num_blocks - len(request.sequences) * self._window_blocks
        return max(1, min(self.max_num_tokens, num_spare * self.kv.tokens_per_block + 1))

    def max_kv_tokens(self, request: RequestState) -> int:
        """Tokens that one sequence of the request has in the cache at most."""
        return request.num_prompt_tokens + request.max_tokens - 1

    def worst_case(self, request: RequestState) -> int:
        """Returns the most blocks the request can hold from now on."""
        kv = self.kv
        num_branches = self._num_branches(request)
        longest = kv.blocks_for(self.max_kv_tokens(request))
        if kv.window is None:
            can_share = self._shares and num_branches > 1
            num_shared = request.num_prompt_tokens // kv.tokens_per_block if can_share else 0
            return num_shared + num_branches * (longest - num_shared)
        chunk = min(self.max_chunk(request), max(s.num_tokens - s.num_computed_tokens for s in request.sequences))
        num_live = len(request.sequences)
        with_chunk = num_live * self._window_blocks + kv.blocks_for(chunk - 1)
        return min(num_branches * longest, max(with_chunk, num_branches * self._window_blocks))

    def present(self, request: RequestState) -> int:
        """Returns the most blocks the request needs to compute the tokens it has, and to write one more of each."""
        kv, longest = self.kv, self.max_kv_tokens(request)
        needs = [kv.blocks_for(min(s.num_tokens + 1, longest)) for s in request.sequences]
        num_shared = 0
        if self._shares and len(needs) > 1:
            num_shared = request.num_prompt_tokens // kv.tokens_per_block
        total = num_shared + sum(needs) - num_shared * len(needs)
        return min(total, self.worst_case(request))

    def held(self, request: RequestState) -> int:
        """Returns how many distinct blocks the request holds."""
        kv, sequences = self.kv, request.sequences
        if len(sequences) == 1:
            return kv.num_held(sequences[0])
        if not self._shares:
            return len({b for s in sequences for b in s.blocks if b >= 0})
        num_shared = request.num_prompt_tokens // kv.tokens_per_block
        tails = {block for s in sequences for block in s.blocks[num_shared:]}
        return len(tails) + max(min(len(s.blocks), num_shared) for s in sequences)

    def outstanding(self, requests: Iterable[RequestState]) -> int:
        """Returns the blocks that these requests may still take, all at their worst."""
        kv, total = self.kv, 0
        for request in requests:
            sequences = request.sequences
            if kv.window is None and len(sequences) == 1 and request.width == 1:
                longest = -(-(sequences[0].num_prompt_tokens + request.max_tokens - 1) // kv.tokens_per_block)
                total += max(0, longest - len(sequences[0].blocks))
            else:
                total += max(0, self.worst_case(request) - self.held(request))
        return total

    def _num_branches(self, request: RequestState) -> int:
        """How many sequences may go separate ways."""
        if request.max_tokens == 1:
            return 1
        if request.params.use_beam_search:
            return request.width
        first = request.sequences[0]
        is_forked = len(request.sequences) > 1 or request.finished or first.num_output_tokens
        return len(request.sequences) if is_forked else request.width
