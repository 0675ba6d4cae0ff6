"""When a sequence ends: end token, stop tokens, stop strings, max_tokens; and what streaming may already show.

What the outputs hold (docs/sampling.md):

* The end token (``end_id``) is never part of ``token_ids`` nor of the text.
* A stop token or stop string, and everything after it, is cut from ``token_ids`` and text, unless
  ``include_stop_str_in_output``. Tokens are cut from the one in which the stop string begins; ``token_ids`` then decode
  to a prefix of the text.
* Nothing before ``min_tokens`` tokens ends a sequence, and cutting never leaves fewer.
* ``cumulative_logprob`` counts every token that was generated, the cut ones too.
"""

from __future__ import annotations

from bisect import bisect_left

from lamella_executor.sampler.types import NewToken
from lamella_executor.sequence import RequestState, Sequence


class StopChecker:
    """Appends generated tokens to sequences and ends them. Stateless: everything lives in the sequence."""

    def append(self, sequence: Sequence, request: RequestState, token: NewToken) -> None:
        """Appends one sampled token: ids, log-probabilities, text; then sets finish_reason and stop_reason if it ended.

        The one way a generated token gets onto a sequence; the decoder must not be fed elsewhere. Call it after
        ``num_computed_tokens`` was advanced over the tokens of this step: cutting lowers it again.
        """
        sequence.token_ids.append(token.token_id)
        if token.logprob is not None:
            sequence.cumulative_logprob += token.logprob
        if token.top_logprobs is not None:
            sequence.logprobs.append(token.top_logprobs)
        self.check(sequence, request)

    def check(self, sequence: Sequence, request: RequestState) -> None:
        """Ends ``sequence`` if its last token, just appended to token_ids but not to the decoder, ends it.

        Feeds the decoder: an end token that is cut never reaches it. Sets finish_reason, stop_reason and text_limit.
        """
        params = request.params
        token_id = sequence.token_ids[-1]
        may_stop = sequence.num_output_tokens > params.min_tokens
        if may_stop and is_end_token(token_id, request):
            _cut_tokens(sequence, sequence.num_output_tokens - 1)
            _finish(sequence, "stop", None)
            return
        is_stop_token = may_stop and token_id in params.stop_ids
        if is_stop_token and not params.include_stop_str_in_output:
            _cut_tokens(sequence, sequence.num_output_tokens - 1)
            _finish(sequence, "stop", token_id)
            return
        decoder = sequence.decoder
        if decoder is not None:
            decoder.push(token_id)
            if params.stop_strings:
                sequence.text_ends.append(len(decoder.text))
        if self._ends_in_stop_string(sequence, request):
            return
        if is_stop_token:
            _finish(sequence, "stop", token_id)
        elif sequence.num_output_tokens >= request.max_tokens:
            _finish(sequence, "length", None)
            self._ends_in_stop_string(sequence, request)  # in what the decoder had held back

    def _ends_in_stop_string(self, sequence: Sequence, request: RequestState) -> bool:
        """Looks for a stop string that ends in the newest token's text; on a match cuts and finishes the sequence."""
        stops = request.params.stop_strings
        if not stops or sequence.decoder is None:
            return False
        text = sequence.decoder.text
        searched = sequence.text_ends[-2] if len(sequence.text_ends) > 1 else 0
        earliest = _first_stoppable(sequence, request)
        found: tuple[int, int, str] | None = None  # end, start, stop string: the one completed first, then the longest
        for stop in stops:
            start = text.find(stop, max(earliest, searched - len(stop) + 1))
            if start >= 0:
                match = (start + len(stop), start, stop)
                found = match if found is None or match < found else found
        if found is None:
            return False
        end, start, stop = found
        is_included = request.params.include_stop_str_in_output
        sequence.text_limit = end if is_included else start
        if not is_included:
            _cut_tokens(sequence, max(request.params.min_tokens, _tokens_within(sequence.text_ends, start)))
        _finish(sequence, "stop", stop)
        return True


def is_end_token(token_id: int, request: RequestState) -> bool:
    """Whether the token is one of the model's end-of-sequence tokens for this request."""
    return token_id == request.end_id or token_id in request.extra_end_ids


def streamable_length(sequence: Sequence, request: RequestState) -> int:
    """Characters of ``sequence.text`` that no later token can take back.

    While the sequence runs, text that might be the beginning of a stop string is held back; never shrinks from one
    token to the next.
    """
    text = sequence.text
    stops = request.params.stop_strings
    if sequence.finish_reason is not None or not stops:
        return len(text)
    earliest = _first_stoppable(sequence, request)
    length = len(text)
    for stop in stops:
        start = text.find(stop[0], max(earliest, len(text) - len(stop) + 1), length)
        while start >= 0:
            if stop.startswith(text[start:]):
                length = start
                break
            start = text.find(stop[0], start + 1, length)
    return length


def streamable_tokens(sequence: Sequence, request: RequestState) -> int:
    """Generated tokens that streaming may show: those whose text is within `streamable_length`."""
    if sequence.finish_reason is not None or not request.params.stop_strings or sequence.decoder is None:
        return sequence.num_output_tokens
    return _tokens_within(sequence.text_ends, streamable_length(sequence, request))


def _first_stoppable(sequence: Sequence, request: RequestState) -> int:
    """Returns the first character at which a stop string may begin: after the text of the first min_tokens tokens."""
    protected = request.params.min_tokens
    if not protected:
        return 0
    ends = sequence.text_ends
    return ends[protected - 1] if len(ends) >= protected else len(sequence.text) + 1


def _tokens_within(text_ends: list[int], length: int) -> int:
    """Returns how many leading tokens make at most ``length`` characters.

    Tokens after the one that reaches ``length`` are left out even if they added no character: they may hold the first
    bytes of the next one.
    """
    count = bisect_left(text_ends, length)
    is_reached = length > 0 and count < len(text_ends) and text_ends[count] == length
    return count + is_reached


def _cut_tokens(sequence: Sequence, num_output_tokens: int) -> None:
    """Drops the generated tokens after the first ``num_output_tokens``, with all that is kept per token."""
    num_tokens = sequence.num_prompt_tokens + num_output_tokens
    del sequence.token_ids[num_tokens:]
    del sequence.logprobs[num_output_tokens:]
    del sequence.text_ends[num_output_tokens:]
    sequence.num_computed_tokens = min(sequence.num_computed_tokens, num_tokens)


def _finish(sequence: Sequence, reason: str, stop_reason: int | str | None) -> None:
    sequence.finish_reason = reason
    sequence.stop_reason = stop_reason
    if sequence.decoder is not None:
        sequence.decoder.finish()
