"""Life and death of an executor: no thread survives, nothing hangs, an idle engine costs nothing."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from tests.support.echo_loop import EchoLoop, echo_executor
from tests.support.sharded import sharded_engine
from tests.support.warm_python import WarmProcess, WarmPython

from lamella_core.errors import EngineDeadError
from lamella_executor import RequestStatus, SamplingParams, engine_thread

EXIT_LIMIT_S = 10  # seconds; the promise is 5, a busy test machine gets twice that


def engine_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("lamella-engine")]


def wait_for(condition, limit_s: float = EXIT_LIMIT_S) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = len(engine_threads())
    yield
    gc.collect()
    assert wait_for(lambda: len(engine_threads()) <= before)


def test_leaving_with_ends_the_thread_and_what_was_running():
    loop = EchoLoop()
    loop.gate.clear()
    with echo_executor(loop) as executor:
        future = executor.generate_async([1], SamplingParams(max_tokens=50))
        assert len(engine_threads()) == 1
        threading.Timer(0.05, loop.gate.set).start()
    assert not engine_threads()
    with pytest.raises(EngineDeadError, match="shut down"):
        future.result(timeout=1)
    with pytest.raises(EngineDeadError, match="shut down"):
        executor.generate([1])
    executor.shutdown()
    executor.shutdown()


def test_an_exception_in_user_code_propagates():
    with pytest.raises(ZeroDivisionError), echo_executor() as executor:
        executor.generate_async([1], SamplingParams(max_tokens=50))
        raise ZeroDivisionError
    assert not engine_threads()


def test_dropping_the_executor_ends_its_thread_and_frees_the_loop():
    loop = EchoLoop()
    gone = weakref.ref(loop)
    executor = echo_executor(loop)
    executor.generate([1])
    del loop, executor
    gc.collect()
    assert wait_for(lambda: not engine_threads())
    gc.collect()
    assert gone() is None


def test_dropping_the_executor_fails_what_is_running():
    loop = EchoLoop()
    loop.gate.clear()
    future = echo_executor(loop).generate_async([1], SamplingParams(max_tokens=50))
    gc.collect()
    loop.gate.set()
    with pytest.raises(EngineDeadError, match="shut down"):
        future.result(timeout=EXIT_LIMIT_S)


def test_a_dead_engine_frees_its_loop():
    loop = EchoLoop(break_at=1)
    gone = weakref.ref(loop)
    executor = echo_executor(loop)
    future = executor.generate_async([1])
    with pytest.raises(EngineDeadError) as caught:
        future.result(timeout=EXIT_LIMIT_S)
    del loop
    assert wait_for(lambda: not engine_threads())
    gc.collect()
    assert gone() is None, "the error's traceback keeps the loop alive"
    assert caught.value.__cause__ is not None
    executor.shutdown()


def test_twenty_cycles_leave_no_thread():
    for _ in range(20):
        with echo_executor() as executor:
            assert executor.generate([1], SamplingParams(max_tokens=2)).outputs[0].token_ids == [10, 11]
        assert not engine_threads()


def test_two_executors_work_side_by_side():
    with echo_executor() as one, echo_executor() as two:
        a = [one.generate_async([1], SamplingParams(max_tokens=20)) for _ in range(10)]
        b = [two.generate_async([1], SamplingParams(max_tokens=20)) for _ in range(10)]
        assert all(len(r.result(10).outputs[0].token_ids) == 20 for r in a + b)
        one.shutdown()
        assert two.generate([1]).done


def test_submitting_from_many_threads_races_with_shutdown():
    outcomes: list[str] = []

    def submit() -> None:
        while True:
            try:
                executor.generate_async([1], SamplingParams(max_tokens=3)).result(timeout=10)
            except EngineDeadError:
                outcomes.append("dead")
                return

    executor = echo_executor()
    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    executor.shutdown()
    for thread in threads:
        thread.join(10)
    assert outcomes == ["dead"] * 8


def test_an_idle_engine_uses_no_processor_time():
    with echo_executor() as executor:
        executor.generate([1])
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


RunScript = Callable[[str], WarmProcess]


@pytest.fixture(scope="module")
def run_script() -> Iterator[RunScript]:
    """Starts processes that run a script with echo executors at hand."""
    python = WarmPython("tests.support.echo_loop")
    prelude = "from tests.support.echo_loop import *\nfrom lamella_executor import SamplingParams\n"
    yield lambda body: python.start(prelude + textwrap.dedent(body))
    python.close()


def test_the_interpreter_exits_without_close(run_script: RunScript):
    process = run_script(
        """
        executor = echo_executor()
        executor.generate([1])
        future = executor.generate_async([1], SamplingParams(max_tokens=60))
        print("end", flush=True)
        """
    )
    assert process.stdout.readline() == "end\n"
    _, errors = process.communicate(timeout=EXIT_LIMIT_S)
    assert (process.returncode, errors) == (0, "")


def test_the_interpreter_exits_while_a_model_computes(run_script: RunScript):
    directory = sharded_engine("LlamaForCausalLM", "grouped", 1)
    process = run_script(
        f"""
        from lamella_executor import GenerationExecutor, KvCacheConfig
        executor = GenerationExecutor.create({str(directory)!r}, KvCacheConfig(max_tokens=1024))
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        futures = [executor.generate_async([5], params) for _ in range(64)]
        next(iter(executor.generate_async([6], params, streaming=True)))
        print("end", flush=True)
        """
    )
    line = process.stdout.readline()
    while line not in ("end\n", ""):
        line = process.stdout.readline()
    _, errors = process.communicate(timeout=EXIT_LIMIT_S)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "Fatal" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    "wait", ["future.result()", "list(future)", "executor.generate([1])", "asyncio.run(future.aresult())"]
)
def test_ctrl_c_while_waiting(wait, run_script: RunScript):
    process = run_script(
        f"""
        import asyncio
        loop = EchoLoop()
        loop.gate.clear()
        with echo_executor(loop) as executor:
            future = executor.generate_async([1], SamplingParams(max_tokens=60))
            print("waiting", flush=True)
            try:
                {wait}
            except KeyboardInterrupt:
                loop.gate.set()
                raise
        """
    )
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=EXIT_LIMIT_S)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_at_the_end_of_the_interpreter_does_not_cut_a_step_short(run_script: RunScript):
    process = run_script(
        """
        import atexit
        import time
        loop = EchoLoop()
        loop.gate.clear()
        opener = threading.Timer(1.5, loop.gate.set)
        opener.daemon = True
        atexit.register(lambda: print(f"{loop.num_steps} steps", flush=True))  # runs after the executor's
        executor = echo_executor(loop)
        future = executor.generate_async([1], SamplingParams(max_tokens=60))
        opener.start()
        while not loop.active:  # from then on a step is certain
            time.sleep(0.01)
        print("end", flush=True)
        """
    )
    assert process.stdout.readline() == "end\n"
    for _ in range(3):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=EXIT_LIMIT_S)
    assert (process.returncode, output, errors) == (0, "1 steps\n", "")


def test_import_is_light():
    modules = "lamella_executor, lamella_executor.config, lamella_executor.result"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


@pytest.mark.parametrize("needs_host", [False, True])
def test_submitting_threads_give_way_to_a_loop_that_needs_the_host(needs_host, monkeypatch):
    pauses, loop = [], EchoLoop()
    monkeypatch.setattr(engine_thread, "time", SimpleNamespace(sleep=pauses.append))
    loop.needs_host = needs_host
    with echo_executor(loop) as executor:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        for result in [executor.generate_async([token], params) for token in (5, 6)]:
            result.result(EXIT_LIMIT_S)
        executor.generate([[5], [6], [7]], params)  # prepared before: nothing to be long about
    assert len(pauses) == 2 * needs_host


def test_a_thread_interrupted_while_it_gives_way_has_submitted_nothing(monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_thread, "time", SimpleNamespace(sleep=interrupt))
    loop, prompts = EchoLoop(), []
    submit = loop.submit
    monkeypatch.setattr(
        loop, "submit", lambda command: prompts.append(command.result.prompt_token_ids) or submit(command)
    )
    loop.needs_host = True
    with echo_executor(loop) as executor:
        with pytest.raises(KeyboardInterrupt):
            executor.generate_async([5])
        executor.generate([6], SamplingParams(max_tokens=2, ignore_eos=True))
    assert prompts == [[6]]


def test_a_batch_interrupted_while_it_is_sent_leaves_nothing_running(monkeypatch):
    loop = EchoLoop()
    with echo_executor(loop) as executor:
        loop.gate.clear()
        commands = [executor.prepare([token]) for token in (5, 6, 7)]
        put, sent = executor._mailbox.put, []

        def put_two(command):
            if len(sent) == 2:
                raise KeyboardInterrupt
            sent.append(command)
            put(command)

        monkeypatch.setattr(executor._mailbox, "put", put_two)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(commands)
        loop.gate.set()
        for command in sent:
            assert command.result.result(EXIT_LIMIT_S).status is RequestStatus.CANCELLED
    assert not commands[2].result.done
