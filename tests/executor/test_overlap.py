"""The loop that runs one step ahead: what overlaps, what is dropped, what a failure ends. On the fake device."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.fake_device import POISON, FakeDevice, FakeRunner, FakeStep
from tests.support.fake_engine import Shape
from tests.support.fake_loop import FakeLoop, LetterDecoder, told

from lamella_core.errors import EngineDeadError, RequestError, StepError
from lamella_executor import RequestStatus, SamplingParams
from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.sampler.device import is_device_sampled

ROOMY = Shape(num_blocks=200, tokens_per_block=4, max_batch_size=8, max_num_tokens=64)


def prompt(number: int, length: int = 9) -> list[int]:
    return [1 + (number * 13 + i * 7) % 20 for i in range(length)]


def greedy(max_tokens: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more)


def alone(ids: list[int], params: SamplingParams, seed: int = 1) -> list[int]:
    """The tokens that the request gets without any other."""
    loop = FakeLoop(ROOMY, is_overlapped=False)
    result = loop.submit(ids, params, seed=seed)
    loop.run()
    return result.outputs[0].token_ids


@pytest.fixture
def it() -> FakeLoop:
    return FakeLoop(ROOMY, is_overlapped=True)


def test_every_decoding_step_is_launched_before_the_last_is_collected(it: FakeLoop) -> None:
    results = [it.submit(prompt(i), greedy()) for i in range(4)]
    it.run()
    assert it.device.num_steps == 12, "a length end costs no row"
    assert it.device.num_overlapped == 11
    assert it.device.num_pending == 4 * 11
    assert [r.outputs[0].token_ids for r in results] == [alone(prompt(i), greedy()) for i in range(4)]
    assert {r.outputs[0].finish_reason for r in results} == {"length"}


def test_a_stop_token_costs_one_row(it: FakeLoop) -> None:
    tokens = alone(prompt(1), greedy())
    stop = next(t for i, t in enumerate(tokens) if i >= 3 and t not in tokens[:i])
    result = it.submit(prompt(1), greedy(stop_token_ids=[stop]))
    it.run()
    length = tokens.index(stop)
    assert result.outputs[0].token_ids == tokens[:length]
    assert it.device.num_steps == length + 2  # the prompt's, one per token but the last, one for nothing
    generated = sum(s.num_generation_tokens for s in it.stats.snapshot())
    assert generated == length + 1


def test_a_place_is_free_before_the_last_token_is_known() -> None:
    loop = FakeLoop(Shape(num_blocks=40, max_batch_size=2, max_num_tokens=64), is_overlapped=True)
    for number in range(8):
        loop.submit(prompt(number), greedy(5))
    loop.run()
    assert loop.device.num_steps == 4 * 5, "a place stood empty for a step"


def test_host_sampled_neighbours_are_collected_at_once(it: FakeLoop) -> None:
    params = [greedy(), greedy(logprobs=1), greedy(n=2, use_beam_search=True), greedy(repetition_penalty=1.2)]
    results = [it.submit(prompt(i), p) for i, p in enumerate(params)]
    assert [is_device_sampled(it.requests[i]) for i in range(4)] == [True, False, False, False]
    it.run()
    assert it.device.num_overlapped == 0 == it.device.num_pending
    assert results[0].outputs[0].token_ids == alone(prompt(0), params[0])
    assert results[1].outputs[0].token_ids == alone(prompt(1), params[1])
    assert results[3].outputs[0].token_ids == alone(prompt(3), params[3])


def test_a_prompt_in_chunks_of_a_host_sampled_request_does_not_break_the_overlap() -> None:
    loop = FakeLoop(Shape(num_blocks=80, max_num_tokens=8), is_overlapped=True)
    loop.submit(prompt(0, 4), greedy(20))
    loop.submit(prompt(1, 60), greedy(1, logprobs=1))
    loop.run()
    assert loop.device.num_overlapped >= 8


def test_streams_show_each_token_once_and_no_other(it: FakeLoop) -> None:
    result = it.submit(prompt(2), greedy(), streaming=True, decoder=LetterDecoder())
    seen: list[int] = []
    text = ""
    while it.loop.has_work:
        it.step()
        for output in result.outputs:
            assert len(output.token_ids) - len(seen) in (0, 1)
            seen, text = list(output.token_ids), output.text
    assert seen == alone(prompt(2), greedy())
    assert text == "".join(chr(ord("a") + t) for t in seen)


def test_an_abort_drops_what_is_in_flight_and_keeps_what_is_known(it: FakeLoop) -> None:
    kept, dropped = it.submit(prompt(0), greedy()), it.submit(prompt(1), greedy())
    for _ in range(5):
        it.step()
    it.abort(dropped)
    assert dropped.status is RequestStatus.CANCELLED
    assert dropped.outputs[0].token_ids == alone(prompt(1), greedy())[:4]  # of five launched
    it.run()
    assert kept.outputs[0].token_ids == alone(prompt(0), greedy())


def test_an_id_may_come_back_while_a_row_of_its_last_owner_is_in_flight(it: FakeLoop) -> None:
    first = it.submit(prompt(0), greedy())
    it.step()
    it.step()
    it.abort(first)
    it.requests.clear()
    it.results.clear()
    second = it.submit(prompt(1), greedy())
    assert second.request_id == first.request_id
    it.run()
    assert second.outputs[0].token_ids == alone(prompt(1), greedy())


def test_a_paused_request_takes_its_pending_token_with_it() -> None:
    shape = Shape(12, 4, max_batch_size=8, max_num_tokens=64, policy=CapacitySchedulerPolicy.MAX_UTILIZATION)
    loop = FakeLoop(shape, is_overlapped=True)
    results = [loop.submit(prompt(i, 8), greedy(25), streaming=True) for i in range(6)]
    loop.run()
    assert sum(request.num_pauses for request in loop.requests.values()) > 0
    assert [r.outputs[0].token_ids for r in results] == [alone(prompt(i, 8), greedy(25)) for i in range(6)]


def test_bad_logits_fail_their_request_and_drop_its_next_row(it: FakeLoop) -> None:
    good = it.submit(prompt(0), greedy())
    bad = it.submit([5, 6, POISON], greedy())
    it.run()
    with pytest.raises(RequestError, match="NaN logits at token position 3"):
        bad.result()
    assert good.outputs[0].token_ids == alone(prompt(0), greedy())
    assert it.device.num_overlapped == 11


def test_whole_blocks_of_generated_tokens_are_found_again(it: FakeLoop) -> None:
    first = it.submit(prompt(0, 10), greedy(12))
    it.run()
    tokens = prompt(0, 10) + first.outputs[0].token_ids
    second = it.submit([*tokens, 3], greedy(2))
    it.run()
    assert second.metrics is not None and second.metrics.num_reused_tokens == 20  # the last of 22 is never computed


def test_a_prompt_is_found_while_it_is_still_computed(it: FakeLoop) -> None:
    it.submit(prompt(0, 33), greedy(8))
    it.step()
    second = it.submit(prompt(0, 33), greedy(8))
    it.run()
    assert second.metrics is not None and second.metrics.num_reused_tokens == 32


# errors


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_failing_launch_fails_its_requests_after_the_step_before_is_delivered(number: int) -> None:
    """The one request that ends with the step before is not among them."""
    loop = FakeLoop(ROOMY, is_overlapped=True, failing={number})
    early = loop.submit(prompt(0), greedy(number - 1)) if number > 1 else None
    late = loop.submit(prompt(1), greedy(12), streaming=True)
    for _ in range(number):
        loop.step()
    with pytest.raises(StepError, match="MemoryError: no room for activations"):
        late.result()
    assert [o.token_ids for o in late.outputs] == ([alone(prompt(1), greedy())[: number - 1]] if number > 1 else [])
    if early is not None:
        assert early.result().outputs[0].token_ids == alone(prompt(0), greedy())[: number - 1]
    again = loop.submit(prompt(1), greedy(12))
    loop.run()
    assert again.outputs[0].token_ids == alone(prompt(1), greedy())
    assert again.metrics is not None and again.metrics.num_reused_tokens == 0


def test_a_failing_launch_leaves_no_copy_to_be_found() -> None:
    """Copies that were planned for a failed step are not made, and nobody computes with what is in their place."""
    loop = FakeLoop(ROOMY, is_overlapped=True, failing={2})
    loop.submit(prompt(0, 11), greedy(1))
    loop.step()
    prompts = [[*prompt(0, 7), 20 - i] for i in range(2)]
    results = [loop.submit(ids, greedy(4)) for ids in prompts]  # both copy the head of a block
    loop.step()
    assert all(isinstance(r.error, StepError) for r in results)
    again = [loop.submit(ids, greedy(4)) for ids in prompts]
    loop.run()
    assert [r.outputs[0].token_ids for r in again] == [alone(ids, greedy(4)) for ids in prompts]


@pytest.mark.parametrize("number", [1, 4])
def test_a_failing_collection_is_fatal_and_leaves_nothing_in_flight(number: int) -> None:
    loop = FakeLoop(ROOMY, is_overlapped=True, breaking={number})
    results = [loop.submit(prompt(i), greedy()) for i in range(3)]
    with pytest.raises(ArithmeticError, match="the device broke") as caught:
        loop.run()
    loop.die(caught.value)
    for result in results:
        with pytest.raises(EngineDeadError, match="the device broke"):
            result.result()
    assert loop.device.in_flight == [] and not loop.loop.has_work


def test_the_end_of_a_loop_waits_for_the_step_in_flight_whatever_becomes_of_it() -> None:
    for breaking in (set(), {2}):
        loop = FakeLoop(ROOMY, is_overlapped=True, breaking=breaking)
        result = loop.submit(prompt(0), greedy())
        loop.step()
        loop.step()
        assert len(loop.device.in_flight) == 1
        loop.die(RuntimeError("shut down"))
        assert loop.device.in_flight == [] and not loop.loop.has_work
        assert isinstance(result.error, EngineDeadError)


def test_an_unknown_code_is_fatal(it: FakeLoop) -> None:
    it.submit(prompt(0), greedy())
    it.step()
    it.device.in_flight[0].tokens = [-9]
    with pytest.raises(RuntimeError, match="returned token -9"):
        it.step()


def test_decoders_and_processors_fail_only_their_request(it: FakeLoop) -> None:
    class Broken(LetterDecoder):
        def push(self, token_id: int) -> None:
            if len(self.text) == 3:
                raise UnicodeError("broken tokenizer")
            super().push(token_id)

    good = it.submit(prompt(0), greedy())
    bad = it.submit(prompt(1), greedy(), decoder=Broken())
    it.run()
    with pytest.raises(RequestError, match="UnicodeError"):
        bad.result()
    assert good.outputs[0].token_ids == alone(prompt(0), greedy())


# numbers


def test_iterations_count_each_token_once_and_time_what_they_collect(it: FakeLoop) -> None:
    for number in range(3):
        it.submit(prompt(number), greedy(6))
    it.run()
    stats = it.stats.snapshot()
    assert sum(s.num_context_tokens for s in stats) == 27
    assert sum(s.num_generation_tokens for s in stats) == 15
    assert stats[0].forward_s == stats[0].wait_s == 0.0, "nothing was collected in the first iteration"
    assert all(s.forward_s >= s.wait_s >= 0 and s.latency_s >= s.wait_s for s in stats)
    assert stats[-1].num_live_blocks == 0 and len(stats) == 7


def test_both_loops_tell_the_same(it: FakeLoop) -> None:
    other = FakeLoop(ROOMY, is_overlapped=False)
    params = [greedy(), greedy(temperature=1.0), SamplingParams(max_tokens=9), greedy(stop="cd"), greedy(n=2, top_k=5)]
    results: list[list[Any]] = []
    for loop in (it, other):
        results.append([loop.submit(prompt(i), p, seed=i, decoder=LetterDecoder()) for i, p in enumerate(params)])
        loop.run()
    assert [told(r) for r in results[0]] == [told(r) for r in results[1]]


def test_the_loop_needs_the_host_but_not_while_it_waits_for_the_device(
    it: FakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[str, bool]] = []
    launch, collect = FakeDevice.launch, FakeStep.collect
    monkeypatch.setattr(FakeDevice, "launch", lambda self, plan: note("launch") or launch(self, plan))
    monkeypatch.setattr(FakeStep, "collect", lambda self: note("collect") or collect(self))

    def note(what: str) -> None:
        noted.append((what, it.loop.needs_host))

    it.submit(prompt(1), greedy(4))
    it.run()
    assert set(noted) == {("launch", True), ("collect", False)} and not it.loop.needs_host


def test_a_loop_that_computes_on_the_host_does_not_keep_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[bool] = []
    run, it = FakeRunner.run, FakeLoop(ROOMY, is_overlapped=False)
    monkeypatch.setattr(FakeRunner, "run", lambda self, plan: noted.append(it.loop.needs_host) or run(self, plan))
    it.submit(prompt(1), greedy(4))
    it.run()
    assert noted and not any(noted)


def test_the_loop_needs_no_host_after_an_error() -> None:
    it = FakeLoop(ROOMY, is_overlapped=True, breaking={1})
    it.submit(prompt(1), greedy(4))
    with pytest.raises(ArithmeticError):
        it.run()
    assert not it.loop.needs_host
