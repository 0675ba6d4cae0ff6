"""What tests of the scheduler and of the loop above it share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lamella_executor.scheduler import tiles


@pytest.fixture(scope="module")
def small_tiles() -> Iterator[None]:
    """Steps of a few rows leave decoding requests out, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LEAST_TILES", 1)
        patch.setattr(tiles, "LEFT_FRACTION", 1)
        yield
