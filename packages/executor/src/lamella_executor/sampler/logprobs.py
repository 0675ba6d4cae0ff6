"""Log-probabilities of generated tokens and of prompt tokens.

All of them are those of the model itself: the float32 log-softmax of its logits, before penalties, bias, processors,
temperature and filters. So they can be compared between requests, and with a plain forward pass.
Every row is computed on its own: the values of a row are bitwise the same whatever else is in the batch or the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from lamella_executor.sequence import Logprob, RequestState


def needs_logprobs(request: RequestState) -> bool:
    """Whether generated tokens of this request need log-probabilities: asked for, or to rank candidates.

    If not, `NewToken.logprob` is None and the cumulative log-probability is unknown (it costs a pass over the logits).
    """
    params = request.params
    return params.logprobs is not None or params.use_beam_search or params.width > params.n


def top_logprobs(row: torch.Tensor, token_id: int, k: int) -> dict[int, Logprob]:
    """Returns the k most likely tokens and ``token_id``, most likely first (``token_id`` last if it is not among them).

    Args:
        row: [vocab_size] float32 log-probabilities.
        token_id: the token that was chosen.
        k: 0 gives only the chosen token.
    """
    out: dict[int, Logprob] = {}
    if k:
        values, ids = row.topk(min(k, row.shape[0]))
        for rank, (token, value) in enumerate(zip(ids.tolist(), values.tolist()), start=1):
            out[token] = Logprob(value, rank)
    if token_id not in out:
        value = row[token_id]
        out[token_id] = Logprob(value.item(), 1 + int((row > value).sum()))
    return out


def prompt_logprobs(logits: torch.Tensor, next_token_ids: SequenceOf[int], k: int) -> list[dict[int, Logprob]]:
    """Returns for each prompt position the log-probabilities of the token that follows it.

    Args:
        logits: [n, vocab_size] float32, rows of n consecutive prompt tokens (any chunk of them).
        next_token_ids: the n prompt tokens one position later.
        k: how many top tokens beside the one that is there.
    """
    return [
        top_logprobs(row.log_softmax(-1), token, k) for row, token in zip(logits.unbind(0), next_token_ids, strict=True)
    ]
