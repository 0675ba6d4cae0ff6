"""Plans cross to other ranks unchanged, whatever traffic, pauses, aborts and failing steps do, and take few bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.executor.test_overlap_properties import Arrival, arrivals, shapes
from tests.support.device_steps import Drive, cpu_runner, request_of
from tests.support.executors import prompt
from tests.support.fake_device import Violation
from tests.support.fake_engine import Shape
from tests.support.fake_loop import FakeLoop

from lamella_executor import SamplingParams
from lamella_executor.sampler.device import is_device_sampled, pack_sampling
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import EVICTED_BLOCK, RequestState, Sequence
from lamella_executor.worker.plan_wire import PlanDecoder, PlanEncoder


class Wire:
    """An encoder and a decoder; every plan that goes through is compared with what comes out."""

    def __init__(self, tokens_per_block: int) -> None:
        self.encoder, self.decoder = PlanEncoder(tokens_per_block), PlanDecoder()
        self.size = tokens_per_block
        self.twins: dict[Sequence, Sequence] = {}
        self.num_items = 0
        self.num_bytes = 0

    def send(self, plan: StepPlan) -> StepPlan:
        buffer = self.encoder.encode(plan)
        self.num_bytes = len(buffer)
        mirrored = self.decoder.decode(buffer)
        assert len(self.decoder) == len(self.encoder)
        assert mirrored.block_copies == plan.block_copies and mirrored.state_copies == plan.state_copies
        assert len(mirrored.items) == len(plan.items)
        for item, twin in zip(plan.items, mirrored.items):
            self.compare(item, twin)
        assert len({item.sequence for item in mirrored.items}) == len(plan.items)
        self.num_items += len(plan.items)
        return mirrored

    def compare(self, item: ScheduledSequence, twin: ScheduledSequence) -> None:
        for name in ("start", "end", "num_tokens", "num_logits", "is_sampled"):
            assert getattr(item, name) == getattr(twin, name), name
        ours, theirs = item.sequence, twin.sequence
        assert theirs.token_ids[item.start : item.end] == ours.token_ids[item.start : item.end]
        assert theirs.num_prompt_tokens == ours.num_prompt_tokens
        assert theirs.num_computed_tokens == item.start and theirs.state_slot == ours.state_slot
        assert len(theirs.blocks) == len(ours.blocks)
        assert all(a == b for a, b in zip(ours.blocks, theirs.blocks) if a != EVICTED_BLOCK)
        assert is_device_sampled(twin.request) == is_device_sampled(item.request)
        assert pack_sampling(twin.request) == pack_sampling(item.request)
        assert twin.request.params.is_greedy or is_device_sampled(item.request)
        assert twin.sequence in twin.request.sequences


class Crossing:
    """Stands before a fake device; some launches fail before, and some after, the plan has gone out."""

    def __init__(self, device: Any, wire: Wire, unsent: frozenset[int]) -> None:
        self.device, self.wire, self.unsent = device, wire, unsent
        self.num_launches = 0
        self.num_pending = 0

    def launch(self, plan: StepPlan) -> Any:
        self.num_launches += 1
        if self.num_launches in self.unsent:
            token = plan.items[-1].sequence.token_ids
            known, token[plan.items[-1].start] = token[plan.items[-1].start], 1 << 40
            with pytest.raises(OverflowError):
                self.wire.encoder.encode(plan)
            token[plan.items[-1].start] = known
            raise MemoryError("not launched")
        try:
            self.wire.send(plan)
        except Exception as error:  # the loop would take it for a step that failed
            raise Violation(str(error)) from error
        self.num_pending += sum(item.sequence.token_ids[item.end - 1] < 0 for item in plan.items)
        return self.device.launch(plan)


def drive(shape: Shape, traffic: list[Arrival], unsent: frozenset[int]) -> Crossing:
    loop = FakeLoop(shape, is_overlapped=True)
    crossing = Crossing(loop.device, Wire(shape.tokens_per_block), unsent)
    loop.loop._runner = crossing
    results: dict[int, Any] = {}
    for step in range(2_000):
        for number, arrival in enumerate(traffic):
            if arrival.step == step:
                results[number] = arrival.submit(loop, number)
            if arrival.aborted_after is not None and step == arrival.step + arrival.aborted_after:
                loop.abort(results[number])
        if loop.loop.has_work:
            loop.step()
        elif step > 28:
            return crossing
    raise AssertionError("the loop does not come to an end")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=shapes,
    traffic=st.lists(arrivals, min_size=1, max_size=12),
    unsent=st.frozensets(st.integers(1, 40), max_size=3),
)
def test_random_traffic_arrives_as_it_was_sent(shape, traffic, unsent):
    drive(shape, traffic, unsent)


def test_pending_tokens_and_copies_cross():
    arrival = Arrival(0, "greedy", 0, 18, 0, 16, False, False, None)
    samples = Arrival(1, "samples", 1, 9, 3, 8, False, False, None)
    crossing = drive(Shape(num_blocks=40), [arrival, samples, arrival], frozenset())
    assert crossing.num_pending > 5 and crossing.wire.num_items > 20


@given(
    temperature=st.floats(0.0, 10.0), top_k=st.integers(0, 1 << 40), top_p=st.floats(0.0, 1.0),
    min_p=st.floats(0.0, 1.0), seed=st.integers(-(1 << 130), 1 << 130),
)  # fmt: skip
def test_sampling_parameters_keep_every_bit(temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    Wire(4).send(plan_of([request(5, params=params, seed=seed)], 5))


def test_a_twin_runner_samples_the_same_tokens():
    kinds = [{}, {"temperature": 1.3}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}, {"top_p": 0.8}]
    requests = [request_of(prompt(5 + 4 * i), SamplingParams(**k), i, seed=1 << 65 | i) for i, k in enumerate(kinds)]
    mine, twin, wire = cpu_runner(), cpu_runner(), Wire(4)

    class Both:
        def launch(self, plan: StepPlan) -> Any:
            mirrored = wire.send(plan)
            step, other = mine.launch(plan), twin.launch(mirrored)
            both.steps.append((step, other))
            return step

    both = Both()
    both.steps = []
    Drive(both, requests, chunk=6).generate(12, ahead=True)
    for step, other in both.steps:
        assert step.collect() == other.collect()
    assert len(both.steps) > 12


def request(
    num_tokens: int, *, params: SamplingParams | None = None, first_block: int = 0, **more: Any
) -> RequestState:
    state = request_of([3] * num_tokens, params, **more)
    state.sequences[0].blocks = list(range(first_block, first_block + -(-num_tokens // 4)))
    return state


def plan_of(requests: list[RequestState], num_tokens: int = 1) -> StepPlan:
    items = []
    for state in requests:
        sequence = state.sequences[0]
        items.append(ScheduledSequence(state, sequence, sequence.num_tokens - num_tokens, num_tokens, 1))
    return StepPlan(items)


def test_a_decoding_sequence_takes_eight_bytes_and_a_block_twenty():
    wire, requests = Wire(4), [request(6, first_block=2 * i) for i in range(200)]
    wire.send(plan_of(requests, 6))
    for _ in range(2):
        for state in requests:
            state.sequences[0].token_ids.append(7)
        wire.send(plan_of(requests))
        assert wire.num_bytes == 40 + 8 * 200
    for number, state in enumerate(requests):
        state.sequences[0].token_ids.append(7)
        state.sequences[0].blocks.append(400 + number)
    wire.send(plan_of(requests))
    assert wire.num_bytes == 40 + (8 + 20) * 200


def test_sequences_that_ended_are_forgotten_on_both_sides():
    wire, stays = Wire(4), request(6, first_block=90)
    for _ in range(2_000):
        passing = request(5)
        stays.sequences[0].token_ids.append(1)
        stays.sequences[0].blocks = list(range(90, 90 + -(-stays.sequences[0].num_tokens // 4)))
        wire.send(plan_of([stays, passing]))
        passing.sequences[0].blocks = []
        assert len(wire.decoder) <= 65


def test_a_block_replaced_under_a_chunk_crosses():
    wire, state = Wire(4), request(16)
    sequence = state.sequences[0]
    wire.send(StepPlan([ScheduledSequence(state, sequence, 0, 16, 1)]))
    sequence.blocks[2] = 77
    wire.send(StepPlan([ScheduledSequence(state, sequence, 8, 8, 1)]))


def test_a_step_that_was_not_sent_is_not_missed():
    wire, old, new = Wire(4), request(5), request(9, first_block=20)
    wire.send(plan_of([old], 5))
    new.sequences[0].state_slot = 1 << 40
    old.sequences[0].token_ids.append(4)
    for _ in range(2):
        with pytest.raises(OverflowError):
            wire.encoder.encode(plan_of([old, new]))
    new.sequences[0].state_slot = 0
    for _ in range(100):
        passing = request(5)
        wire.send(plan_of([old, passing]))
        passing.sequences[0].blocks = []
    old.sequences[0].blocks, new.sequences[0].blocks = [], [1, 2, 3]
    for _ in range(300):
        wire.send(plan_of([new]))
    assert len(wire.decoder) == 1


def test_a_state_slot_crosses_and_may_change():
    wire, state = Wire(4), request(5)
    for slot in (3, 3, 0, -1):
        state.sequences[0].state_slot = slot
        state.sequences[0].token_ids.append(1)
        wire.send(plan_of([state]))


def test_what_is_not_the_next_step_is_refused():
    wire, state = Wire(4), request(5)
    first = wire.encoder.encode(plan_of([state], 5))
    second = wire.encoder.encode(plan_of([state]))
    with pytest.raises(RuntimeError, match="step 2 came after step 0"):
        PlanDecoder().decode(second)
    decoder = PlanDecoder()
    decoder.decode(first)
    with pytest.raises(RuntimeError, match="step 1 came after step 1"):
        decoder.decode(first)
    for broken in (b"", first[:-4], first + b"\0\0\0\0", first[:-1], b"\xff" * len(first)):
        with pytest.raises(RuntimeError, match="step"):
            PlanDecoder().decode(broken)
