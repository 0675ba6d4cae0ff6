"""Random traffic: a pipeline gives every request what a loop gives that waits for each step."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.executor.test_overlap_properties import Arrival, agree, arrivals, drive, shapes
from tests.support.fake_engine import Shape

from lamella_core.errors import RequestError
from lamella_executor.config import CapacitySchedulerPolicy

FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(
    shape=shapes,
    traffic=st.lists(arrivals, min_size=1, max_size=12),
    num_batches=st.integers(2, 5),
    is_sampling=st.booleans(),
)
def test_pipelined_is_synchronous(shape: Shape, traffic: list[Arrival], num_batches: int, is_sampling: bool) -> None:
    pipelined, mine = drive(shape, traffic, num_batches=num_batches, is_sampling=is_sampling)
    _, theirs = drive(shape, traffic)
    for one, other in zip(mine, theirs):
        assert one is not None and other is not None
        agree(one, other)
    assert all(request.num_pauses <= 4 for request in pipelined.requests.values())


@pytest.mark.parametrize("policy", list(CapacitySchedulerPolicy))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    traffic=st.lists(arrivals, min_size=4, max_size=12),
    num_blocks=st.integers(9, 14),
    reused=st.booleans(),
    num_batches=st.integers(2, 4),
)
def test_a_tiny_pool_changes_nothing(
    policy: CapacitySchedulerPolicy, traffic: list[Arrival], num_blocks: int, reused: bool, num_batches: int
) -> None:
    shape = Shape(num_blocks=num_blocks, tokens_per_block=4, policy=policy, is_reused=reused)
    roomy = Shape(num_blocks=200, tokens_per_block=4, max_num_tokens=64, is_reused=False)
    _, mine = drive(shape, traffic, num_batches=num_batches)
    _, theirs = drive(roomy, traffic)
    for one, other in zip(mine, theirs):
        assert one is not None and other is not None
        if not isinstance(one.error, RequestError) or "KV cache" not in str(one.error):
            agree(one, other)
