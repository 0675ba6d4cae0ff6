"""The user's logits processors, kept from harming anything but their own request."""

from __future__ import annotations

import torch

from lamella_core.errors import RequestError
from lamella_executor.sequence import RequestState


def run_processors(scores: torch.Tensor, request: RequestState) -> None:
    """Calls the request's processors in order; each edits the scores in place.

    Args:
        scores: [num_sequences, vocab_size] float32; a processor sees it as [1, num_sequences, vocab_size].
        request: whose live sequences the rows belong to.

    Raises:
        RequestError: a processor raised; the message names it, ``__cause__`` is what it raised.
    """
    view = scores.unsqueeze(0)
    for processor in request.params.processors:
        token_ids = [list(sequence.token_ids) for sequence in request.sequences]
        try:
            processor(request.request_id, view, token_ids, None, None)
        except BaseException as error:  # the user's code may raise anything, also SystemExit
            raise RequestError(
                f"the logits processor {_name(processor)} raised {type(error).__name__}: {error}"
            ) from error


def _name(processor: object) -> str:
    return getattr(processor, "__qualname__", None) or type(processor).__qualname__
