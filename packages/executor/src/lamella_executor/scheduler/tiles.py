"""RowTiles: which decode tokens to leave out of a large step with prompts, so that its rows fill whole tiles.

The newest are left out, but in turn: each request that decodes once before one of them again, however long prompts come
in numbers that leave the same few rows over.
"""

from __future__ import annotations

from lamella_executor.scheduler.microbatch import is_chunk
from lamella_executor.scheduler.plan import ScheduledSequence
from lamella_executor.sequence import RequestState

LEAST_TILES = 4  # of rows: smaller steps take whatever there is
LEFT_FRACTION = 8  # of the requests that decode: how many may be left out of a step with prompts for the sake of a tile


class RowTiles:
    """What the device's tiles of rows mean for a step.

    Args:
        row_tile: the device takes as long for any number of rows as for the next multiple of this.
    """

    def __init__(self, row_tile: int) -> None:
        self._row_tile = row_tile
        self._left: set[RequestState] = set()  # left out of some step since all had their turn

    def surplus(self, items: list[ScheduledSequence], num_rows: int) -> list[ScheduledSequence]:
        """Returns the decode tokens to leave out of a step of these items; none where it does not pay.

        Args:
            items: in row order, of requests oldest first.
            num_rows: sum of their tokens.
        """
        num_left = num_rows % self._row_tile
        if not 0 < num_left <= self._row_tile // 2 or num_rows < LEAST_TILES * self._row_tile:
            return []
        if not is_chunk(items[-1]):
            return []
        decoding = [item for item in items if not is_chunk(item) and len(item.request.sequences) == 1]
        if num_left > len(decoding) // LEFT_FRACTION:
            return []
        spared = [item for item in decoding if item.request not in self._left]
        if num_left > len(spared):  # all had their turn
            self._left.clear()
            spared = decoding
        left = spared[-num_left:]
        self._left.update([item.request for item in left])
        return left

    def forget(self, request: RequestState) -> None:
        """The request does not run any more; harmless if it is not known."""
        self._left.discard(request)
