"""Random traffic through scheduler and KV manager: each request ends once, with the tokens of a straight-line model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.fake_engine import FakeEngine, Shape

from lamella_core.errors import RequestError
from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("small_tiles")

FAMILIES = 3  # prompts of one family begin alike


@dataclass(frozen=True)
class Arrival:
    """A request and its fate."""

    step: int
    family: int
    num_common: int
    num_own: int
    max_tokens: int
    width: int
    is_beam: bool
    prompt_logprobs: int | None
    aborted_after: int | None  # steps after arrival
    fails: bool  # its forward gives NaN in the first step that computes it

    def prompt(self, number: int) -> list[int]:
        common = [1 + (self.family * 7 + i * 3) % 49 for i in range(self.num_common)]
        own = [1 + (number * 11 + i * 5) % 49 for i in range(self.num_own)]
        return (common + own) or [1]

    def params(self) -> SamplingParams:
        fields = {"max_tokens": self.max_tokens, "best_of": self.width, "prompt_logprobs": self.prompt_logprobs}
        if self.is_beam:
            return SamplingParams(use_beam_search=True, **fields)
        return SamplingParams(temperature=1.0, **fields)


def rarely(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.none(), st.none(), st.none(), strategy)


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 12),
        family=st.integers(0, FAMILIES - 1),
        num_common=st.integers(0, 18),
        num_own=st.integers(0, 12),
        max_tokens=st.integers(1, 16),
        width=st.sampled_from([1, 1, 1, 2, 3, 4]),
        is_beam=st.booleans(),
        prompt_logprobs=rarely(st.just(0)),
        aborted_after=rarely(st.integers(0, 12)),
        fails=st.sampled_from([False] * 9 + [True]),
    ),
    min_size=1,
    max_size=14,
)


shapes = st.builds(
    Shape,
    num_blocks=st.integers(3, 40),
    tokens_per_block=st.sampled_from([1, 2, 4, 8]),
    max_batch_size=st.integers(1, 8),
    max_num_tokens=st.sampled_from([1, 3, 8, 16, 64]),
    policy=st.sampled_from(list(CapacitySchedulerPolicy)),
    is_chunked=st.sampled_from([True, True, False]),
    is_reused=st.sampled_from([True, True, False]),
    is_partially_reused=st.booleans(),
    window=st.one_of(st.none(), st.none(), st.integers(1, 20)),
    num_sinks=st.integers(0, 5),
    row_tile=st.sampled_from([1, 1, 2, 4]),
)


def drive(shape: Shape, traffic: list[Arrival]) -> FakeEngine:
    engine = FakeEngine(shape)
    ids: dict[int, int] = {}
    step = 0
    while step <= 24 or engine.scheduler.has_work:
        for number, arrival in enumerate(traffic):
            if arrival.step == step:
                try:
                    ids[number] = engine.add(arrival.prompt(number), arrival.params())
                except RequestError:
                    continue
            if arrival.aborted_after is not None and arrival.step + arrival.aborted_after == step and number in ids:
                engine.abort(ids[number])
        failing = {ids[n] for n, a in enumerate(traffic) if a.fails and n in ids}
        engine.step(failing)
        step += 1
        assert step < 5_000
    engine.check_outputs()
    return engine


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes, traffic=arrivals)
def test_random_traffic_ends_once_with_the_right_tokens(shape: Shape, traffic: list[Arrival]) -> None:
    engine = drive(shape, traffic)
    assert all(request.num_pauses <= 4 for request in engine.requests.values())
    assert engine.kv.stats().num_live == 0


@pytest.mark.parametrize("policy", list(CapacitySchedulerPolicy))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traffic=arrivals, num_blocks=st.integers(8, 14), reused=st.booleans())
def test_a_tiny_pool_only_delays(
    policy: CapacitySchedulerPolicy, traffic: list[Arrival], num_blocks: int, reused: bool
) -> None:
    drive(Shape(num_blocks=num_blocks, tokens_per_block=4, policy=policy, is_reused=reused), traffic)
