"""GenerationResult: every way of waiting, the state machine, and the differences between yields."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading

import pytest
from tests.support.echo_loop import EchoLoop, echo_executor

from lamella_core.errors import EngineDeadError, RequestError
from lamella_executor import CompletionOutput, GenerationResult, RequestStatus, SamplingParams
from lamella_executor.mailbox import Mailbox
from lamella_executor.request import RequestUpdate

PARAMS = SamplingParams(max_tokens=5)
TOKENS = [10, 11, 12, 13, 14]
TERMINAL = (RequestStatus.FINISHED, RequestStatus.CANCELLED, RequestStatus.FAILED)


def loose_result(streaming: bool = True) -> GenerationResult:
    return GenerationResult(1, [1], PARAMS, Mailbox(), streaming=streaming)


def running(tokens: list[int], status: RequestStatus = RequestStatus.RUNNING) -> RequestUpdate:
    return RequestUpdate(status, outputs=[CompletionOutput(0, "".join(map(chr, tokens)), list(tokens))])


@pytest.fixture
def executor():
    with echo_executor() as it:
        yield it


def test_result_returns_the_object_itself(executor):
    future = executor.generate_async([1], PARAMS)
    assert future.result(timeout=10) is future
    assert future.done and future.status is RequestStatus.FINISHED
    assert future.outputs[0].token_ids == TOKENS
    assert future.outputs[0].length == 5
    assert future.outputs[0].finish_reason == "length"


def test_result_times_out_in_total_and_the_request_goes_on():
    loop = EchoLoop()
    loop.gate.clear()
    with echo_executor(loop) as executor:
        future = executor.generate_async([1], PARAMS)
        with pytest.raises(TimeoutError, match="it goes on"):
            future.result(timeout=0.05)
        with pytest.raises(TimeoutError):
            asyncio.run(future.aresult(timeout=0.05))
        assert not future.done
        loop.gate.set()
        assert future.result(timeout=10).outputs[0].token_ids == TOKENS


def test_sync_iteration_yields_the_object_with_differences_that_add_up(executor):
    future = executor.generate_async([1], PARAMS, streaming=True)
    ids, text = [], ""
    for partial in future:
        assert partial is future
        ids += partial.outputs[0].token_ids_diff
        text += partial.outputs[0].text_diff
    assert ids == TOKENS == future.outputs[0].token_ids
    assert text == future.outputs[0].text


def test_iterating_a_request_that_does_not_stream_yields_once(executor):
    assert [r.outputs[0].token_ids for r in executor.generate_async([1], PARAMS)] == [TOKENS]


def test_iterating_a_finished_result_yields_once(executor):
    future = executor.generate_async([1], PARAMS, streaming=True).result()
    assert [list(r.outputs[0].token_ids) for r in future] == [TOKENS]


async def test_await_and_async_iteration(executor):
    future = executor.generate_async([1], PARAMS, streaming=True)
    ids = []
    async for partial in future:
        ids += partial.outputs[0].token_ids_diff
    assert ids == TOKENS
    assert (await future) is future
    assert await executor.generate_async([1], PARAMS).aresult(timeout=10)


async def test_many_waiters_in_several_loops_and_threads():
    loop = EchoLoop()
    loop.gate.clear()
    with echo_executor(loop) as executor:
        future = executor.generate_async([1], PARAMS, streaming=True)

        async def read() -> list[int]:
            seen: list[int] = []
            async for partial in future:
                seen = partial.outputs[0].token_ids
            return seen

        in_threads: list[list[int]] = []
        threads = [
            threading.Thread(target=lambda: in_threads.append(asyncio.run(read()))),
            threading.Thread(target=lambda: in_threads.append(future.result(10).outputs[0].token_ids)),
            threading.Thread(target=lambda: in_threads.append([r.outputs[0].token_ids for r in future][-1])),
        ]
        for thread in threads:
            thread.start()
        here = [asyncio.ensure_future(read()), asyncio.ensure_future(future.aresult())]
        await asyncio.sleep(0.01)
        loop.gate.set()
        outcomes = await asyncio.gather(*here)
        for thread in threads:
            await asyncio.to_thread(thread.join, 10)
    assert outcomes[0] == TOKENS
    assert in_threads == [TOKENS] * 3


async def test_a_cancelled_waiter_leaves_the_others():
    result = loose_result()
    first, second = asyncio.ensure_future(result.aresult()), asyncio.ensure_future(result.aresult())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    result.publish(running([65]))
    result.publish(RequestUpdate(RequestStatus.FINISHED))
    assert await second is result
    assert first.cancelled()


def test_a_waiter_whose_event_loop_was_closed_does_no_harm():
    result = loose_result()
    loop = asyncio.new_event_loop()
    task = loop.create_task(result.aresult())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    result.publish(RequestUpdate(RequestStatus.CANCELLED))
    assert result.done
    task._log_destroy_pending = False  # it can never run again


def test_outputs_stand_still_between_yields_and_nothing_is_lost():
    result = loose_result()
    result.publish(running([65]))
    iterator = iter(result)
    next(iterator)
    result.publish(running([65, 66]))
    result.publish(running([65, 66, 67]))
    assert result.outputs[0].token_ids == [65]
    next(iterator)
    assert result.outputs[0].text_diff == "BC"
    assert result.outputs[0].token_ids_diff == [66, 67]
    result.publish(RequestUpdate(RequestStatus.CANCELLED, outputs=[CompletionOutput(0, "ABC", [65, 66, 67])]))
    next(iterator)
    assert result.outputs[0].token_ids_diff == []
    assert list(iterator) == []


def test_outputs_are_current_without_iteration():
    result = loose_result()
    result.publish(running([65]))
    assert result.outputs[0].token_ids == [65]
    result.publish(running([65, 66]))
    assert result.outputs[0].token_ids == [65, 66]


def test_each_waiter_of_a_failed_request_raises_its_own_error():
    result = loose_result()
    cause = ValueError("why")
    error = RequestError("bad")
    error.__cause__ = cause
    result.publish(RequestUpdate(RequestStatus.FAILED, error=error))
    raised = []
    for wait in (result.result, lambda: list(result), lambda: asyncio.run(result.aresult())):
        with pytest.raises(RequestError, match="bad") as caught:
            wait()
        raised.append(caught.value)
        assert caught.value.__cause__ is cause
    assert len({id(e) for e in raised} | {id(error)}) == 4
    assert result.error is error


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RequestStatus, RequestStatus)))
def test_only_the_documented_transitions_are_possible(old, new):
    paths = {
        RequestStatus.QUEUED: [],
        RequestStatus.RUNNING: [RequestStatus.RUNNING],
        RequestStatus.PAUSED: [RequestStatus.RUNNING, RequestStatus.PAUSED],
        **{status: [status] for status in TERMINAL},
    }
    result = loose_result()
    for status in paths[old]:
        result.publish(RequestUpdate(status))
    allowed = {
        RequestStatus.QUEUED: {RequestStatus.QUEUED, RequestStatus.RUNNING, *TERMINAL},
        RequestStatus.RUNNING: {RequestStatus.RUNNING, RequestStatus.PAUSED, *TERMINAL},
        RequestStatus.PAUSED: {RequestStatus.PAUSED, RequestStatus.RUNNING, *TERMINAL},
    }.get(old, set())
    if new in allowed:
        result.publish(RequestUpdate(new))
        assert result.status is new
    else:
        with pytest.raises(RuntimeError):
            result.publish(RequestUpdate(new))
        assert result.status is old


def test_abort_keeps_what_was_generated():
    loop = EchoLoop()
    with echo_executor(loop) as executor:
        future = executor.generate_async([1], SamplingParams(max_tokens=60), streaming=True)
        next(iter(future))
        loop.gate.clear()
        future.abort()
        loop.gate.set()
        future.result(timeout=10)
        if future.status is RequestStatus.CANCELLED:  # else it had finished before the abort came
            assert future.outputs[0].finish_reason == "cancelled"
        assert future.outputs[0].token_ids[0] == 10
        future.abort()  # harmless


def test_abort_of_unknown_ids_is_ignored(executor):
    executor.abort(12345)
    assert executor.generate_async([1], PARAMS).result(timeout=10).done


def test_results_of_a_dead_engine():
    with echo_executor(EchoLoop(break_at=3)) as executor:
        futures = [executor.generate_async([1], PARAMS)]
        with contextlib.suppress(EngineDeadError):  # the engine may break before all have come
            futures += [executor.generate_async([1], PARAMS) for _ in range(3)]
        for future in futures:
            with pytest.raises(EngineDeadError, match="ArithmeticError: the loop is broken") as caught:
                future.result(timeout=10)
            assert isinstance(caught.value.__cause__, ArithmeticError)
            assert future.status is RequestStatus.FAILED
        with pytest.raises(EngineDeadError, match="the loop is broken"):
            executor.generate_async([1], PARAMS)
        assert not executor.is_alive
        futures[0].abort()
        executor.abort(1)


def test_a_wake_without_news_yields_nothing():
    """A waiter that joins while a publish wakes others may be woken by it."""
    result = loose_result()
    result.publish(running([65]))

    async def read() -> list[list[int]]:
        async def wake_then_end() -> None:
            await asyncio.sleep(0.05)
            result._waiters.popleft()()
            await asyncio.sleep(0.05)
            result.publish(RequestUpdate(RequestStatus.FINISHED, outputs=[CompletionOutput(0, "AB", [65, 66])]))

        task = asyncio.ensure_future(wake_then_end())
        diffs = [update.outputs[0].token_ids_diff async for update in result]
        await task
        return diffs

    assert asyncio.run(read()) == [[65], [66]]
