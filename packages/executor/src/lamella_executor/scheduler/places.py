"""Places: who runs, and whether another request fits beside them."""

from __future__ import annotations

from lamella_executor.sequence import RequestState


class Places:
    """The running requests and what they take of a scheduler's limits.

    Args:
        max_batch_size: `RequestState.slots` of all of them at most.
        max_num_tokens: rows of one step at most.
        num_state_slots: of recurrent states; 0: the model has none.
    """

    def __init__(self, max_batch_size: int, max_num_tokens: int, num_state_slots: int) -> None:
        self.running: dict[RequestState, None] = {}  # in order of admission
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._num_state_slots = num_state_slots
        self._draining: set[RequestState] = set()  # their last token is pending
        self._num_slots = 0  # of max_batch_size, taken by running requests
        self._num_rows = 0  # sum of the running requests' widths: what a step of decode tokens may need

    @property
    def num_free(self) -> int:
        """How many requests may start at most."""
        return 0 if self._num_rows >= self._max_num_tokens else self._max_batch_size - self._num_slots

    def fit(self, request: RequestState) -> bool:
        """Whether slots and rows suffice for a waiting request.

        Slots of recurrent states are counted as many as the running requests may fork into; draining ones hold theirs.
        """
        num_rows = self._num_rows + request.width
        if self._num_slots + request.slots > self._max_batch_size or num_rows > self._max_num_tokens:
            return False
        if not self._num_state_slots:
            return True
        return num_rows + sum([draining.width for draining in self._draining]) <= self._num_state_slots

    def take(self, request: RequestState) -> None:
        """A request starts, the newest now."""
        self.running[request] = None
        self._num_slots += request.slots
        self._num_rows += request.width

    def drain(self, request: RequestState) -> None:
        """A running request's last token is pending: it makes room for others, but keeps what it holds."""
        self._free(request)
        self._draining.add(request)

    def leave(self, request: RequestState) -> None:
        """A request gives back all it holds; harmless if it holds nothing."""
        if request in self.running:
            self._free(request)
        self._draining.discard(request)

    def _free(self, request: RequestState) -> None:
        del self.running[request]
        self._num_slots -= request.slots
        self._num_rows -= request.width
