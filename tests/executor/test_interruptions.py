"""Ctrl-C, forks, user code that raises anything, a loop that breaks: the engine goes on or every waiter is told."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
from tests.support.echo_loop import EchoLoop, echo_executor
from tests.support.executors import bench, greedy, hf_greedy, prompt

from lamella_core.errors import EngineDeadError, RequestError
from lamella_executor import CompletionOutput, GenerationResult, RequestStatus, SamplingParams
from lamella_executor.mailbox import Abort, Mailbox
from lamella_executor.request import RequestUpdate

IDS = prompt(9)
NO_END = SamplingParams(max_tokens=5, ignore_eos=True)


def test_a_reader_stopped_at_the_worst_moment_does_not_stop_the_engine():
    """Ctrl-C may leave a reader's lock held for ever."""
    result = GenerationResult(1, [1], NO_END, Mailbox(), streaming=True)
    holder = threading.Thread(target=result._reading.acquire)
    holder.start()
    holder.join()

    def publish() -> None:
        result.publish(RequestUpdate(RequestStatus.RUNNING, outputs=[CompletionOutput(0, token_ids=[10])]))
        result.publish(RequestUpdate(RequestStatus.FINISHED))

    publisher = threading.Thread(target=publish, daemon=True)
    publisher.start()
    publisher.join(10)
    assert result.done


@pytest.mark.parametrize("prompts", [[7], [[7], [8]]])
def test_an_interrupted_generate_aborts_what_it_submitted(prompts):
    loop = EchoLoop()
    with echo_executor(loop) as executor:
        loop.gate.clear()
        interrupt = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            executor.generate(prompts, NO_END.replace(max_tokens=50))
        loop.gate.set()
        executor.generate([9], NO_END)
        assert not loop.active
        assert loop.num_steps < 50


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_no_engine_and_ends():
    loop = EchoLoop()
    with echo_executor(loop) as executor:
        loop.gate.clear()
        running = executor.generate_async([5], NO_END)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            told = [not executor.is_alive]
            for wait in (lambda: executor.generate([5]), running.result, lambda: next(iter(running))):
                try:
                    wait()
                    told.append(False)
                except EngineDeadError as error:
                    told.append("fork" in str(error))
            executor.shutdown()
            os._exit(0 if all(told) else 1)
        assert os.waitpid(child, 0)[1] == 0
        loop.gate.set()
        assert running.result(10).status is RequestStatus.FINISHED


def test_a_command_put_while_the_mailbox_closes_is_taken_back_or_found():
    class ClosesWhileAppending(Mailbox):
        @property
        def is_closed(self) -> bool:
            is_closed = super().is_closed
            self.close()
            return is_closed

    mailbox = ClosesWhileAppending()
    with pytest.raises(EngineDeadError):
        mailbox.put(Abort(1))
    assert mailbox.take_rest() == []


def test_commands_behind_one_that_breaks_the_loop_fail_too():
    class Loop(EchoLoop):
        def submit(self, command):
            if command.request.sequences[0].token_ids == [66]:
                raise ArithmeticError("the loop is broken")
            super().submit(command)

    loop = Loop()
    with echo_executor(loop) as executor:
        loop.gate.clear()
        results = [executor.generate_async([token], NO_END) for token in (5, 66, 7)]
        loop.gate.set()
        for result in results[1:]:
            with pytest.raises(EngineDeadError, match="ArithmeticError"):
                result.result(10)


def test_a_request_whose_end_breaks_the_engine_is_told(monkeypatch):
    with bench() as it:
        monkeypatch.setattr(it.loop._scheduler, "finish", lambda *_, **__: 1 // 0)
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            it.executor.generate_async(IDS, greedy(3)).result(10)


class FaultyDecoder:
    """Raises ``error`` in the operation ``where``."""

    def __init__(self, where, error):
        self.where, self.error, self.num_tokens = where, error, 0

    @property
    def text(self):
        self._at("text")
        return "a" * self.num_tokens

    def push(self, token_id):
        self.num_tokens += 1
        self._at("push")

    def finish(self):
        self._at("finish")

    def fork(self):
        self._at("fork")
        return FaultyDecoder(self.where, self.error)

    def _at(self, where):
        if where == self.where and self.num_tokens > 2:
            raise self.error


def test_user_code_that_raises_anything_fails_only_its_request():
    def exits(*_):
        sys.exit(3)

    with bench() as it:
        neighbour = it.executor.generate_async(IDS, greedy(40))
        bad = [it.executor.generate_async(IDS, greedy(6, logits_processor=exits))]
        for where in ("text", "push", "finish"):
            for streaming in (True, False):
                for error in (ValueError("boom"), SystemExit("boom")):
                    decoder = FaultyDecoder(where, error)
                    bad.append(it.executor.generate_async(IDS, greedy(6), streaming, decoder=decoder))
        beams = greedy(6, use_beam_search=True, n=3)
        bad.append(it.executor.generate_async(IDS, beams, decoder=FaultyDecoder("fork", SystemExit("boom"))))
        for result in bad:
            with pytest.raises(RequestError, match="raised (ValueError: boom|SystemExit)"):
                result.result(30)
        aborted = it.executor.generate_async(
            IDS, greedy(50), decoder=(decoder := FaultyDecoder("text", ValueError("boom")))
        )
        decoder.num_tokens = 3
        aborted.abort()
        with pytest.raises(RequestError, match="boom"):
            aborted.result(30)
        assert neighbour.result(30).outputs[0].token_ids == hf_greedy(IDS, 40)
        assert it.idle_blocks() == (0, 0)


def test_a_processor_that_waits_for_its_own_engine_fails_instead_of_hanging():
    with bench() as it:

        def asks(*_):
            it.executor.generate([5], greedy(2))

        with pytest.raises(RequestError, match="wait for ever"):
            it.executor.generate_async(IDS, greedy(3, logits_processor=asks)).result(10)
        assert it.idle_blocks() == (0, 0)


def test_outputs_are_current_again_after_an_abandoned_iteration():
    loop = EchoLoop()
    with echo_executor(loop) as executor:
        result = executor.generate_async([5], NO_END, streaming=True)
        for _ in result:
            break
        executor.generate([6], NO_END)
        assert result.outputs[0].token_ids == [10, 11, 12, 13, 14]
