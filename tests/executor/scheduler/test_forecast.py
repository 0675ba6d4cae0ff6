"""BlockForecast against a plain simulation, and what the policy that asks it admits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.fake_device import VOCAB
from tests.support.fake_engine import Shape
from tests.support.fake_loop import FakeLoop

from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler import policy
from lamella_executor.scheduler.forecast import BlockForecast
from lamella_executor.sequence import RequestState, Sequence

PEAK = CapacitySchedulerPolicy.PREDICTED_PEAK
NO_EVICT = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT


def make_request(number: int) -> RequestState:
    return RequestState(number, SamplingParams(), 0, None, 1, [Sequence(0, [1], 1)], 0.0)


class Simulation:
    """One request after another, step after step."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.now = 0
        self.courses: dict[RequestState, tuple[int, int, int, int]] = {}  # first step, tokens in it, steps, shared

    def held(self, course: tuple[int, int, int, int], step: int) -> int:
        first, num_tokens, num_steps, shared = course
        done = max(step - first, 0)
        if done > num_steps:
            return 0
        return -(-(num_tokens + min(done, num_steps - 1)) // self.size) - shared

    def total(self, step: int) -> int:
        return sum(self.held(course, step) for course in self.courses.values())


changes = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "tick", "tick", "tick", "delay", "end"]),
        st.integers(0, 50),  # which request; tokens
        st.integers(1, 60),  # steps
        st.integers(0, 2),  # shared blocks
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(size=st.sampled_from([1, 3, 16]), traffic=changes, jump=st.sampled_from([0, 0, 1000, 5000]))
def test_the_forecast_is_the_sum_of_its_requests(
    size: int, traffic: list[tuple[str, int, int, int]], jump: int
) -> None:
    forecast, simulation = BlockForecast(size), Simulation(size)
    for _ in range(jump):
        forecast.tick()
    simulation.now = jump
    for number, (change, which, num_steps, shared) in enumerate(traffic):
        known = list(simulation.courses)
        if change == "start":
            request, num_tokens = make_request(number), which + 1 + shared * size
            levels = forecast.growing(num_tokens, num_steps, shared)
            course = (simulation.now, num_tokens, num_steps, shared)
            coming = range(simulation.now, simulation.now + num_steps + 1)
            expected = max(simulation.total(t) + simulation.held(course, t) for t in coming)
            assert forecast.peak_with(levels) == expected
            forecast.add(request, levels)
            simulation.courses[request] = course
        elif change == "tick":
            forecast.tick()
            simulation.now += 1
        elif known:
            request = known[which % len(known)]
            first, num_tokens, steps, held = simulation.courses[request]
            if simulation.now - first > steps or change == "end":
                forecast.remove(request)
                del simulation.courses[request]
            else:
                forecast.delay(request)
                simulation.courses[request] = (first + 1, num_tokens, steps, held)
        assert forecast.present == simulation.total(simulation.now)
    for request in list(simulation.courses):
        forecast.remove(request)
    assert not forecast._blocks[forecast._now - forecast._origin :].any()


def test_a_constant_course_is_held_to_its_end() -> None:
    forecast = BlockForecast(4)
    forecast.add(make_request(0), forecast.constant(5, 3))
    seen = []
    for _ in range(5):
        seen.append(forecast.present)
        forecast.tick()
    assert seen == [5, 5, 5, 5, 0]  # given back a step after its last


# the policy


def submit(loop: FakeLoop, count: int, length: int, max_tokens: int) -> None:
    for number in range(count):
        ids = [1 + (number * 5 + i * 7 + i // 3) % (VOCAB - 2) for i in range(length)]
        loop.submit(ids, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def steps(chosen: CapacitySchedulerPolicy, *, max_num_tokens: int, is_overlapped: bool = True) -> FakeLoop:
    """64 requests of 8 + 32 tokens in the blocks of 10 of them."""
    shape = Shape(100, 4, max_batch_size=64, max_num_tokens=max_num_tokens, policy=chosen, is_reused=False)
    loop = FakeLoop(shape, is_overlapped=is_overlapped)
    submit(loop, 64, 8, 32)
    loop.run()
    return loop


def test_more_run_side_by_side_than_at_their_longest_and_none_is_paused() -> None:
    peak, guaranteed = (steps(chosen, max_num_tokens=64) for chosen in (PEAK, NO_EVICT))
    assert sum(request.num_pauses for request in peak.requests.values()) == 0
    assert peak.device.num_steps < 0.8 * guaranteed.device.num_steps


def starts_and_live(loop: FakeLoop) -> list[tuple[int, int]]:
    """Runs the loop while starts are spread; returns how many requests started in each step, and blocks live then."""
    seen = []
    while policy.CROWD * loop.kv.num_blocks < 18 * len(loop.scheduler.waiting):
        before = len(loop.scheduler.waiting)
        loop.step()
        seen.append((before - len(loop.scheduler.waiting), loop.kv.stats().num_live))
    return seen


def test_requests_of_known_length_start_apart_and_keep_the_cache_full() -> None:
    loop = FakeLoop(Shape(400, 4, max_batch_size=128, max_num_tokens=512, policy=PEAK, is_reused=False))
    submit(loop, 200, 8, 64)  # 18 blocks each at last, and 700 blocks times steps: one in less than two steps
    seen = starts_and_live(loop)
    assert max(starts for starts, _ in seen) <= 2
    full = [live for _, live in seen[80:]]
    assert len(full) > 100 and min(full) > 330
    loop.run()
    assert sum(request.num_pauses for request in loop.requests.values()) == 0


def test_a_batch_that_the_cache_holds_starts_at_once() -> None:
    loop = FakeLoop(Shape(400, 4, max_batch_size=27, max_num_tokens=512, policy=PEAK, is_reused=False))
    submit(loop, 200, 8, 64)  # 27 x 18 blocks are less than one and a quarter times the cache
    loop.step()
    assert len(loop.scheduler.running) > 20
    loop.run()
    assert sum(request.num_pauses for request in loop.requests.values()) == 0


def test_requests_with_little_to_generate_start_at_once() -> None:
    """The cache could take 3 in two steps on average: 36 prompt tokens a step, of at most 64."""
    loop = FakeLoop(Shape(100, 4, max_batch_size=64, max_num_tokens=64, policy=PEAK, is_reused=False))
    submit(loop, 100, 24, 8)
    loop.step()
    loop.step()
    assert len(loop.scheduler.running) == 6
    loop.run()
    assert sum(request.num_pauses for request in loop.requests.values()) == 0


def test_tokens_of_a_prompt_that_are_in_the_cache_count_for_nothing() -> None:
    """They are all but one of 44: else the cache could take one in 12 steps on average, of 12 tokens each."""
    loop = FakeLoop(Shape(100, 4, max_batch_size=64, max_num_tokens=12, policy=PEAK))
    for _ in range(60):
        loop.submit([1] * 44, SamplingParams(max_tokens=64, ignore_eos=True))
    for _ in range(12):
        loop.step()
    assert len(loop.scheduler.running) == 2
    loop.run()
    assert sum(request.num_pauses for request in loop.requests.values()) == 0


def test_a_batch_of_requests_with_branches_that_the_cache_holds_starts_at_once() -> None:
    loop = FakeLoop(Shape(1000, 4, max_batch_size=32, max_num_tokens=512, policy=PEAK, is_reused=False))
    for number in range(40):  # eight of four branches fill the batch; each has 66 blocks at last
        ids = [1 + (number * 5 + i * 7) % (VOCAB - 2) for i in range(8)]
        loop.submit(ids, SamplingParams(n=4, max_tokens=64, ignore_eos=True, temperature=1.0))
    loop.step()
    assert len(loop.scheduler.running) == 8


def test_short_prompts_start_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "GROUP_TOKENS", 24)
    monkeypatch.setattr(policy, "GROUP_FRACTION", 2)
    loop = FakeLoop(Shape(400, 4, max_batch_size=128, max_num_tokens=512, policy=PEAK, is_reused=False))
    submit(loop, 100, 8, 64)
    seen = [starts for starts, _ in starts_and_live(loop)]
    assert seen[0] == 1  # nothing runs: it need not wait for others
    assert set(seen[1:]) == {0, 3}


def test_requests_of_all_lengths_are_hardly_ever_paused() -> None:
    shape = Shape(90, 4, max_batch_size=64, max_num_tokens=40, policy=PEAK)
    loop = FakeLoop(shape, is_overlapped=True)
    for number in range(120):
        ids = [1 + (number * 7 + i * 3 + i * i) % (VOCAB - 2) for i in range(1 + number * 7 % 60)]
        loop.submit(ids, SamplingParams(max_tokens=1 + number * 11 % 50, ignore_eos=number % 2 == 0))
    loop.run()
    assert sum(request.num_pauses for request in loop.requests.values()) <= 4


def test_a_shared_prefix_is_counted_once() -> None:
    shape = Shape(60, 4, max_batch_size=16, max_num_tokens=64, policy=PEAK)
    loop = FakeLoop(shape, is_overlapped=True)
    common = [1 + i % 20 for i in range(120)]  # 30 blocks; two such prompts would fill the cache
    loop.submit([*common, 5], SamplingParams(max_tokens=12, ignore_eos=True))
    loop.step()
    loop.step()
    for number in range(4):
        loop.submit([*common, 6 + number], SamplingParams(max_tokens=12, ignore_eos=True))
    loop.step()
    loop.step()
    assert len(loop.scheduler.running) == 5
    loop.run()
    assert sum(request.num_pauses for request in loop.requests.values()) == 0
