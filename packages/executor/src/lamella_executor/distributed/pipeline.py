"""StageLinks: what one rank of a pipeline sends and receives while it computes one step after another.

Hidden states go from each rank to the one of the next stage that holds the same shard (its tp_rank), results from the
last stage's first rank to rank 0. Every rank computes the steps in the same order and messages between two ranks arrive
in order, so none carries a number. Receivers know all shapes from the plan.
"""

from __future__ import annotations

import logging
from collections import deque

import torch
from torch import Tensor

from lamella_core.errors import CommunicationError
from lamella_executor.distributed.groups import RankGroups, Work

logger = logging.getLogger(__name__)


class PendingResult:
    """What the last stage will send to rank 0 for one step."""

    def __init__(self, tensor: Tensor, work: Work) -> None:
        self._tensor = tensor
        self._work: Work | None = work

    def wait(self) -> Tensor:
        """Returns the tensor once it is complete.

        Raises:
            CommunicationError: a stage died, or the groups were aborted.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._tensor


class StageLinks:
    """The connections of one rank to the stages beside its own.

    Nothing that is sent is waited for until as many messages as there are stages are under way, plus one: then the
    stages behind have fallen back that far.

    Args:
        groups: of this rank; its mapping has more than one stage.
    """

    def __init__(self, groups: RankGroups) -> None:
        mapping = groups.mapping
        self.num_stages = mapping.pp_size
        self.is_first = mapping.is_first_pp_rank
        self.is_last = mapping.is_last_pp_rank
        self.takes_results = mapping.rank == 0
        self.sends_results = mapping.is_last_pp_rank and mapping.tp_rank == 0
        self._groups = groups
        self._previous, self._next = mapping.prev_pp_rank, mapping.next_pp_rank
        self._source = (mapping.pp_size - 1) * mapping.tp_size  # of results
        self._sent: deque[tuple[Work, Tensor]] = deque()  # the oldest first; tensors must live until they are taken

    def receive_hidden(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor | None:
        """Waits for the previous stage's hidden states [num_tokens, hidden_size]; None on the first stage."""
        if self._previous is None:
            return None
        hidden = torch.empty(num_tokens, hidden_size, dtype=dtype, device=self._groups.device)
        self.receive_into(hidden)
        return hidden

    def receive_into(self, hidden: Tensor) -> None:
        """Receives the previous stage's hidden states [T, H]; the current stream (on a CPU the caller) waits for it."""
        if self._previous is None:
            raise RuntimeError("the first stage has no previous one to receive hidden states from")
        self._groups.receive(hidden, self._previous).wait()

    def send_hidden(self, hidden: Tensor) -> None:
        """Sends hidden states [T, H] to the next stage and does not wait; nobody may write to them any more."""
        if self._next is None:
            raise RuntimeError("the last stage has no next one to send hidden states to")
        self._send(hidden, self._next)

    def hand_over(self, hidden: Tensor) -> None:
        """Sends hidden states [T, H] to the next stage; the current stream (or caller) waits until it takes them."""
        if self._next is None:
            raise RuntimeError("the last stage has no next one to send hidden states to")
        self._groups.send(hidden.contiguous(), self._next).wait()

    def send_result(self, result: Tensor) -> None:
        """Sends a step's result to rank 0 and does not wait; nobody may write to it any more."""
        self._send(result, 0)

    def expect_result(self, shape: tuple[int, ...], dtype: torch.dtype) -> PendingResult:
        """Begins to receive a step's result on rank 0."""
        result = torch.empty(shape, dtype=dtype, device=self._groups.device)
        return PendingResult(result, self._groups.receive(result, self._source))

    def close(self) -> None:
        """Waits for what is under way; if that is in vain, it is given up."""
        try:
            while self._sent:
                self._sent.popleft()[0].wait()
        except CommunicationError as error:
            logger.debug("messages to other stages were given up: %s", error)
            self._sent.clear()

    def _send(self, tensor: Tensor, rank: int) -> None:
        tensor = tensor.contiguous()
        while len(self._sent) > self.num_stages:
            self._sent.popleft()[0].wait()
        self._sent.append((self._groups.send(tensor, rank), tensor))
