"""The loop over a pipeline of fake stages: what overlaps, how work is spread, what an abort and a failure do."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.fake_engine import Shape
from tests.support.fake_loop import FakeLoop, LetterDecoder, told

from lamella_core.errors import EngineDeadError, WorkerError
from lamella_executor import RequestStatus, SamplingParams
from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.scheduler.plan import StepPlan

ROOMY = Shape(num_blocks=200, tokens_per_block=4, max_batch_size=8, max_num_tokens=64)


def prompt(number: int, length: int = 9) -> list[int]:
    return [1 + (number * 13 + i * 7) % 20 for i in range(length)]


def greedy(max_tokens: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more)


def alone(ids: list[int], params: SamplingParams, seed: int = 1) -> list[int]:
    """The tokens that the request gets without any other."""
    loop = FakeLoop(ROOMY)
    result = loop.submit(ids, params, seed=seed)
    loop.run()
    return result.outputs[0].token_ids


def piped(num_batches: int = 2, shape: Shape = ROOMY, **device: Any) -> FakeLoop:
    return FakeLoop(shape, num_batches=num_batches, **device)


def watched(loop: FakeLoop) -> list[list[tuple[int, int]]]:
    """Returns a list that grows by each launch's (request id, rows)."""
    launch, plans = loop.device.launch, []

    def note(plan: StepPlan) -> Any:
        plans.append([(item.request.request_id, item.num_tokens) for item in plan.items])
        return launch(plan)

    loop.device.launch = note
    return plans


@pytest.mark.parametrize("is_sampling", [False, True])
def test_the_first_stage_begins_a_batch_before_the_last_has_ended_the_other(is_sampling: bool) -> None:
    loop = piped(is_sampling=is_sampling)
    plans = watched(loop)
    results = [loop.submit(prompt(i, 1), greedy(6)) for i in range(8)]
    loop.run()
    steady = [plan for plan in plans if len(plan) < 8]
    assert steady == [[(i, 1) for i in batch] for batch in (range(4), range(4, 8))] * 5, "four and four, by turns"
    events = loop.device.log[1:]  # after the launch of all eight prompts at once
    assert events[:6] == [
        ("collect", 1), ("launch", 2), ("launch", 3), ("collect", 2), ("launch", 4), ("collect", 3),
    ]  # fmt: skip
    assert loop.device.num_overlapped == len(plans) - 2
    assert [r.outputs[0].token_ids for r in results] == [alone(prompt(i, 1), greedy(6)) for i in range(8)]


@pytest.mark.parametrize("num_batches", [2, 3, 4])
def test_as_many_steps_as_stages_are_in_flight(num_batches: int) -> None:
    loop = piped(num_batches)
    for number in range(8):
        loop.submit(prompt(number), greedy(30))
    loop.run()
    assert loop.device.overlap > num_batches - 0.3


def test_sizes_become_even_again_when_requests_come_and_go() -> None:
    loop = piped()
    plans = watched(loop)
    for number in range(8):
        loop.submit(prompt(number, 1), greedy(4 if number < 3 else 16))
    loop.run()
    sizes = [len(plan) for plan in plans]
    assert sizes[1:7] == [4] * 6
    assert sorted(sizes[-8:-6]) == sorted(sizes[-4:-2]) == [2, 3], sizes


def test_a_long_prompt_is_cut_into_even_chunks_that_follow_each_other() -> None:
    loop = piped(4, Shape(num_blocks=400, tokens_per_block=4, max_num_tokens=512))
    plans = watched(loop)
    result = loop.submit([1 + i % 20 for i in range(600)][:190], greedy(3))
    loop.run()
    assert plans[0] == [(0, 128)], "fewer tokens would take as long"
    assert plans[1] == [(0, 62)]
    assert loop.device.log[:2] == [("launch", 1), ("launch", 2)], "a chunk without results keeps nobody waiting"
    assert result.outputs[0].length == 3


def test_prompts_are_spread_over_the_steps_beside_decoding() -> None:
    shape = Shape(num_blocks=1000, tokens_per_block=4, max_num_tokens=2048, is_reused=False)
    loop = piped(2, shape)
    for number in range(4):
        loop.submit(prompt(number, 4), greedy(100))
    for _ in range(8):
        loop.step()
    plans = watched(loop)
    for number in range(2):
        ids = [1 + (i * 7 + number) % 20 for i in range(150)]
        loop.submit(ids, greedy(2))
    for _ in range(2):
        loop.step()
    sizes = [[rows for _, rows in plan] for plan in plans]
    assert sizes == [[1, 1, 150], [1, 1, 150]]


def test_one_request_alone_takes_turns_with_itself() -> None:
    loop = piped(3)
    result = loop.submit(prompt(0), greedy())
    loop.run()
    assert result.outputs[0].token_ids == alone(prompt(0), greedy())
    assert loop.device.num_overlapped == 0


@pytest.mark.parametrize("is_sampling", [False, True])
def test_an_abort_takes_effect_while_the_request_is_in_flight(is_sampling: bool) -> None:
    loop = piped(is_sampling=is_sampling)
    plans = watched(loop)
    kept = [loop.submit(prompt(i), greedy()) for i in range(3)]
    dropped = loop.submit(prompt(3), greedy())
    while len(plans) < 8:
        loop.step()
    flying = {request.request_id for requests in loop.device.waiting.values() for request in requests}
    while dropped.request_id not in flying:
        loop.step()
        flying = {request.request_id for requests in loop.device.waiting.values() for request in requests}
    num_held = len(loop.requests[3].sequences[0].blocks)
    live = loop.kv.stats().num_live
    loop.abort(dropped)
    assert dropped.status is RequestStatus.CANCELLED
    assert loop.kv.stats().num_live <= live - num_held + 1, "its blocks go back at once"
    tokens = dropped.outputs[0].token_ids
    assert tokens == alone(prompt(3), greedy())[: len(tokens)]
    loop.run()
    assert [r.outputs[0].token_ids for r in kept] == [alone(prompt(i), greedy()) for i in range(3)]


def test_blocks_of_an_aborted_request_serve_another_while_they_are_in_flight() -> None:
    shape = Shape(num_blocks=6, tokens_per_block=4, max_num_tokens=64, is_reused=False)
    loop = piped(2, shape)
    first = loop.submit(prompt(0, 20), greedy(2))
    loop.step()
    blocks = set(loop.requests[0].sequences[0].blocks)
    loop.abort(first)
    second = loop.submit(prompt(1, 20), greedy(2))
    loop.step()
    assert loop.device.log[:2] == [("launch", 1), ("launch", 2)]
    assert len(blocks & set(loop.requests[1].sequences[0].blocks)) >= 4
    loop.run()
    assert second.outputs[0].token_ids == alone(prompt(1, 20), greedy(2))


def test_nobody_is_paused_in_flight() -> None:
    shape = Shape(12, 4, max_batch_size=8, max_num_tokens=64, policy=CapacitySchedulerPolicy.MAX_UTILIZATION)
    loop = piped(3, shape)
    schedule, num_paused = loop.scheduler.schedule, 0

    def checked() -> StepPlan:
        nonlocal num_paused
        flying = {request for requests in loop.device.waiting.values() for request in requests}
        plan = schedule()
        num_paused += len(plan.paused)
        assert flying.isdisjoint(plan.paused)
        return plan

    loop.scheduler.schedule = checked  # type: ignore[method-assign]
    results = [loop.submit(prompt(i, 8), greedy(25), streaming=True) for i in range(6)]
    loop.run()
    assert [r.outputs[0].token_ids for r in results] == [alone(prompt(i, 8), greedy(25)) for i in range(6)]
    assert num_paused > 0


def test_a_forecast_counts_rounds_not_steps() -> None:
    """Requests that fit one after another by the forecast run as close together as without a pipeline."""
    shape = Shape(20, 4, max_batch_size=8, max_num_tokens=64, policy=CapacitySchedulerPolicy.PREDICTED_PEAK)
    pauses, rounds = [], []
    for loop in (FakeLoop(shape), piped(3, shape)):
        for number in range(12):
            loop.submit(prompt(number, 8), greedy(16))
        loop.run()
        pauses.append(sum(request.num_pauses for request in loop.requests.values()))
        rounds.append(loop.device.num_steps)
    assert pauses == [0, 0]
    assert rounds[1] <= 3 * rounds[0] + 12


def test_prompt_logprobs_beams_and_samples_are_those_of_one_stage() -> None:
    params = [
        greedy(prompt_logprobs=1, logprobs=2), greedy(n=3, use_beam_search=True), greedy(n=2, temperature=1.0),
        greedy(), greedy(stop="cd"), SamplingParams(max_tokens=9), greedy(repetition_penalty=1.2),
    ]  # fmt: skip
    shape = Shape(num_blocks=200, tokens_per_block=4, max_batch_size=12, max_num_tokens=16)
    outcomes: list[list[Any]] = []
    for loop in (FakeLoop(shape), piped(2, shape), piped(3, shape, is_sampling=False)):
        results = [loop.submit(prompt(i, 20), p, seed=i, decoder=LetterDecoder()) for i, p in enumerate(params)]
        loop.run()
        outcomes.append([told(result) for result in results])
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_prompt_is_found_by_the_next_step_while_it_is_in_flight() -> None:
    loop = piped()
    loop.submit(prompt(0, 33), greedy(8))
    loop.step()
    second = loop.submit(prompt(0, 33), greedy(8))
    loop.step()
    assert loop.device.log == [("launch", 1), ("launch", 2), ("collect", 1)]
    loop.run()
    assert second.metrics is not None and second.metrics.num_reused_tokens == 32
    assert second.outputs[0].token_ids == alone(prompt(0, 33), greedy(8))


@pytest.mark.parametrize("trouble", [{"failing": {4}}, {"breaking": {4}}])
def test_a_failing_stage_is_fatal_and_nothing_stays_in_flight(trouble: dict[str, set[int]]) -> None:
    loop = piped(3, **trouble)
    results = [loop.submit(prompt(i), greedy()) for i in range(4)]
    with pytest.raises((MemoryError, ArithmeticError)) as caught:
        loop.run()
    loop.die(caught.value)
    for result in results:
        with pytest.raises(EngineDeadError, match=r"no room for activations|the device broke"):
            result.result()
    assert loop.device.in_flight == [] and not loop.loop.has_work


@pytest.mark.parametrize("kind", [{}, {"is_overlapped": True}, {"num_batches": 2}])
def test_the_death_of_a_worker_is_fatal_in_every_kind_of_loop(kind: dict[str, Any]) -> None:
    loop = FakeLoop(ROOMY, **kind)
    loop.submit(prompt(0), greedy())

    def dies(plan: StepPlan) -> Any:
        raise WorkerError("rank 1 was killed by signal 9 (SIGKILL) in phase decode")

    loop.device.run = loop.device.launch = dies
    if not kind:
        del loop.device.launch
    with pytest.raises(WorkerError, match="rank 1"):
        loop.step()
