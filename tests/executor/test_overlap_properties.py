"""Random traffic: a loop that runs one step ahead gives every request what a loop gives that waits for each step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.fake_device import POISON
from tests.support.fake_engine import Shape
from tests.support.fake_loop import FakeLoop, LetterDecoder, told

from lamella_core.errors import RequestError
from lamella_executor import GenerationResult, RequestStatus, SamplingParams
from lamella_executor.config import CapacitySchedulerPolicy

pytestmark = pytest.mark.usefixtures("small_tiles")

KINDS: dict[str, dict[str, Any]] = {  # what the device samples, and what the host has to
    "greedy": {},
    "sampled": {"temperature": 1.5},
    "filtered": {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    "stop token": {"stop_token_ids": [3, 4, 5, 6]},
    "stop token kept": {"stop_token_ids": [3, 4, 5, 6], "include_stop_str_in_output": True},
    "stop string": {"stop": ["c", "fg", "h"]},
    "no end": {"ignore_eos": True},
    "penalty": {"repetition_penalty": 1.3, "temperature": 1.0},
    "logprobs": {"logprobs": 2},
    "prompt logprobs": {"prompt_logprobs": 1},
    "least": {"min_tokens": 1},
    "samples": {"n": 2, "best_of": 3, "temperature": 1.0},
    "beams": {"n": 2, "use_beam_search": True},
}


@dataclass(frozen=True)
class Arrival:
    """A request and its fate."""

    step: int
    kind: str
    family: int  # prompts of one family begin alike
    num_common: int
    num_own: int
    max_tokens: int
    streaming: bool
    is_poisoned: bool  # its first logits are NaN
    aborted_after: int | None  # steps after arrival

    def prompt(self, number: int) -> list[int]:
        common = [1 + (self.family * 7 + i * 3) % 20 for i in range(self.num_common)]
        own = [1 + (number * 11 + i * 5) % 20 for i in range(self.num_own)]
        return (common + own or [1]) + ([POISON] if self.is_poisoned else [])

    def submit(self, loop: FakeLoop, number: int) -> GenerationResult:
        params = SamplingParams(max_tokens=self.max_tokens, **KINDS[self.kind])
        decoder = LetterDecoder() if self.kind == "stop string" else None
        return loop.submit(self.prompt(number), params, seed=number, streaming=self.streaming, decoder=decoder)


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 14),
    kind=st.sampled_from([*KINDS, *["greedy", "sampled", "no end"] * 4]),
    family=st.integers(0, 2),
    num_common=st.integers(0, 18),
    num_own=st.integers(0, 10),
    max_tokens=st.integers(1, 16),
    streaming=st.booleans(),
    is_poisoned=st.sampled_from([False] * 9 + [True]),
    aborted_after=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 12)),
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
    window=st.one_of(st.none(), st.none(), st.none(), st.integers(1, 20)),
    num_sinks=st.integers(0, 5),
    has_states=st.sampled_from([False, False, True]),
    row_tile=st.sampled_from([1, 1, 2, 4]),
)


def drive(shape: Shape, traffic: list[Arrival], **kind: Any) -> tuple[FakeLoop, list[GenerationResult | None]]:
    """Runs all traffic through a `FakeLoop` of that kind, by its keyword arguments."""
    loop = FakeLoop(shape, **kind)
    results: list[GenerationResult | None] = [None] * len(traffic)
    step = 0
    while step <= 28 or loop.loop.has_work:
        for number, arrival in enumerate(traffic):
            if arrival.step == step:
                results[number] = arrival.submit(loop, number)
            result = results[number]
            if (
                result is not None
                and arrival.aborted_after is not None
                and step == arrival.step + arrival.aborted_after
            ):
                loop.abort(result)
        if loop.loop.has_work:
            loop.step()
        step += 1
        assert step < 3_000
    loop.run()
    return loop, results


def agree(one: GenerationResult, other: GenerationResult) -> None:
    """Equal ends; of aborted requests, one has what the other has or a few tokens less."""
    assert one.done and other.done
    if RequestStatus.CANCELLED not in (one.status, other.status):
        assert told(one) == told(other)
        return
    if one.params.use_beam_search or one.params.best_of:  # which are the best may change with each token
        return
    for a, b in zip(one.outputs, other.outputs):
        length = min(a.length, b.length)
        assert a.token_ids[:length] == b.token_ids[:length]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes, traffic=st.lists(arrivals, min_size=1, max_size=12))
def test_overlapped_is_synchronous(shape: Shape, traffic: list[Arrival]) -> None:
    overlapped, mine = drive(shape, traffic, is_overlapped=True)
    _, theirs = drive(shape, traffic, is_overlapped=False)
    for one, other in zip(mine, theirs):
        assert one is not None and other is not None
        agree(one, other)
    assert all(request.num_pauses <= 4 for request in overlapped.requests.values())


@pytest.mark.parametrize("policy", list(CapacitySchedulerPolicy))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traffic=st.lists(arrivals, min_size=4, max_size=12), num_blocks=st.integers(9, 14), reused=st.booleans())
def test_a_tiny_pool_changes_nothing(
    policy: CapacitySchedulerPolicy, traffic: list[Arrival], num_blocks: int, reused: bool
) -> None:
    shape = Shape(num_blocks=num_blocks, tokens_per_block=4, policy=policy, is_reused=reused)
    roomy = Shape(num_blocks=200, tokens_per_block=4, max_num_tokens=64, is_reused=False)
    _, mine = drive(shape, traffic, is_overlapped=True)
    _, theirs = drive(roomy, traffic, is_overlapped=False)
    for one, other in zip(mine, theirs):
        assert one is not None and other is not None
        if not isinstance(one.error, RequestError) or "KV cache" not in str(one.error):
            agree(one, other)


forking = st.builds(lambda arrival, kind: replace(arrival, kind=kind), arrivals, st.sampled_from(["samples", "beams"]))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    traffic=st.lists(forking | arrivals, min_size=2, max_size=8),
    num_blocks=st.integers(20, 60),
    policy=st.sampled_from(list(CapacitySchedulerPolicy)),
    is_overlapped=st.booleans(),
)
def test_forks_have_recurrent_states_of_their_own(
    traffic: list[Arrival], num_blocks: int, policy: CapacitySchedulerPolicy, is_overlapped: bool
) -> None:
    shape = Shape(num_blocks=num_blocks, max_batch_size=4, policy=policy, has_states=True)
    roomy = Shape(num_blocks=400, max_num_tokens=64, is_reused=False)
    _, mine = drive(shape, traffic, is_overlapped=is_overlapped)
    _, theirs = drive(roomy, traffic, is_overlapped=False)
    for one, other in zip(mine, theirs):
        assert one is not None and other is not None
        if not isinstance(one.error, RequestError) or "KV cache" not in str(one.error):
            agree(one, other)
