"""Life and death of workers: whatever is killed, stopped or interrupted, its end is told and nobody survives it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.worker_crews import belongings, children, go_to, is_alive, make_crew, orders, pids_of, wait_for

from lamella_core.errors import WorkerError
from lamella_executor.worker.crew import Crew

ROOT = Path(__file__).parents[3]
LIMIT_S = 5.0  # from a death to everybody's knowledge of it, and to the last survivor's end
SIGKILL = int(signal.SIGKILL)


@pytest.fixture
def failures() -> list[WorkerError]:
    """What `on_failure` was called with."""
    return []


@pytest.fixture
def crew(request, failures) -> Iterator[Crew]:
    """Two workers that count as dead after as many seconds of silence as the test says."""
    crew = make_crew(3, worker_timeout_s=getattr(request, "param", 30.0), on_failure=failures.append)
    yield crew
    crew.stop(LIMIT_S)
    assert not children()


silence_s = pytest.mark.parametrize("crew", [1.5], indirect=True)


PHASES = ["load", "start", "prefill", "decode"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_worker_is_named_with_signal_and_phase(phase, crew, failures) -> None:
    pids = pids_of(crew)
    go_to(crew, phase, orders(rank1=["hang"], rank2=["hang"]))
    os.kill(pids[1], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(
        WorkerError, match=rf"rank 2 \(pid {pids[1]}\) was killed by signal 9 \(SIGKILL\) in phase {phase}"
    ):
        crew.wait_ready("step 1", 60)
    assert time.monotonic() - started < LIMIT_S
    assert wait_for(lambda: not any(is_alive(pid) for pid in pids), LIMIT_S)
    assert wait_for(lambda: not children())  # reaped, before any stop
    assert [str(error) for error in failures] == [str(crew.failure)]


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        (["signal", int(signal.SIGTERM)], r"was killed by signal 15 \(SIGTERM\) in phase decode, after 0 steps$"),
        (["signal", int(signal.SIGSEGV)], r"(?s)killed by signal 11 \(SIGSEGV\).*The last it wrote:.*in serve"),
        (["abort", "terminate called"], r"(?s)killed by signal 6 \(SIGABRT\).*The last it wrote:\nterminate called\n"),
        (["exit", 3], "exited with code 3 in phase decode"),
        (["exit", 0], "exited with code 0 in phase decode"),
        (["fail", "no such weight"], "(?s)failed in phase decode: ValueError: no such weight\nTraceback.*_fail"),
    ],
    ids=["SIGTERM", "SIGSEGV", "abort", "exit 3", "exit 0", "exception"],
)
def test_whatever_ends_a_worker_is_told(deed, how) -> None:
    crew = make_crew(2)
    go_to(crew, "decode", orders(rank1=deed))
    error = crew.await_failure(LIMIT_S)
    assert str(error).startswith("rank 1 (pid ")
    with pytest.raises(WorkerError, match=how):
        go_to(crew, "decode", orders())
    assert wait_for(lambda: not children())
    crew.stop(LIMIT_S)


def test_who_was_killed_is_named_and_not_who_noticed(crew) -> None:
    """Rank 1 fails first, as a rank does whose peer is gone."""
    go_to(crew, "decode", orders(rank1=["fail", "Connection closed by peer"], rank2=["signal", SIGKILL, 0.1]))
    text = str(crew.await_failure(LIMIT_S))
    assert text.startswith("rank 2 ")
    assert "After it: rank 1: ValueError: Connection closed by peer" in text


def test_a_worker_that_finishes_unasked_has_failed() -> None:
    crew = make_crew(2, serve="tests.support.worker_tasks:leave")
    assert "exited with code 0" in str(crew.await_failure(LIMIT_S))
    crew.stop(LIMIT_S)


@silence_s
@pytest.mark.parametrize("phase", ["load", "decode"])
def test_a_stopped_worker_is_named_within_the_timeout(phase, crew, failures) -> None:
    pids = pids_of(crew)
    go_to(crew, phase, orders(rank2=["stop"]))
    started = time.monotonic()
    text = str(crew.await_failure(10))
    assert time.monotonic() - started < 1.5 + LIMIT_S
    assert text.startswith(f"rank 2 (pid {pids[1]}) has been silent for ")
    assert f"in phase {phase}" in text
    assert "it is stopped (SIGSTOP?); if it was only slow, raise worker_timeout_s" in text
    assert wait_for(lambda: not any(is_alive(pid) for pid in pids) and not children())
    assert len(failures) == 1


def test_a_worker_that_is_stuck_in_a_step_is_named_with_its_place(failures) -> None:
    crew = make_crew(3, worker_timeout_s=30.0, stall_timeout_s=0.8, on_failure=failures.append)
    for step, deed in ((1, ["nothing"]), (2, ["hang"])):
        go_to(crew, "decode", orders(rank2=deed))
        crew.expect(step)
        if step == 1:
            crew.wait_ready("step 1", 5)
    text = str(crew.await_failure(10))
    assert "rank 0 has waited 0.8 s in phase decode for step 2, which is stuck: rank 2 (pid" in text
    assert "after 1 steps, at " in text
    assert "rank 1 " not in text
    crew.stop(LIMIT_S)
    assert len(failures) == 1


@silence_s
def test_a_slow_worker_is_no_dead_one(crew) -> None:
    """It is heard of for as long as it lives; what nobody waits for may take its time."""
    go_to(crew, "load", orders(rank1=["sleep", 2.5]))
    crew.wait_ready("load", 10)
    assert crew.failure is None


@silence_s
def test_a_broadcast_to_a_worker_that_does_not_read_ends(crew) -> None:
    go_to(crew, "decode", orders(rank1=["stop"]))
    with pytest.raises(WorkerError, match="rank 1 .*stopped"):
        for _ in range(100):
            go_to(crew, "decode", b"\0" * 1_000_000)


def test_a_worker_that_sends_nonsense_is_named(crew) -> None:
    go_to(crew, "decode", orders(rank1=["babble"]))
    assert "rank 1 (pid" in str(crew.await_failure(LIMIT_S))
    assert "sent what rank 0 cannot read (a frame claims" in str(crew.failure)


def test_an_error_in_the_call_about_a_failure_changes_nothing(caplog) -> None:
    def on_failure(error: WorkerError) -> None:
        raise RuntimeError("this call failed")

    crew = make_crew(2, on_failure=on_failure)
    go_to(crew, "decode", orders(rank1=["exit", 3]))
    assert "exited with code 3" in str(crew.await_failure(LIMIT_S))
    assert wait_for(lambda: not children())
    crew.stop(LIMIT_S)
    assert "this call failed" in caplog.text


def test_a_new_crew_can_be_made_afterwards(crew) -> None:
    go_to(crew, "decode", orders(rank1=["signal", SIGKILL]))
    assert crew.await_failure(LIMIT_S) is not None
    second = make_crew(2)
    go_to(second, "decode", orders())
    second.wait_ready("step 1", LIMIT_S)
    second.stop(LIMIT_S)


def start_script(text: str) -> subprocess.Popen[str]:
    prelude = "import os, sys, time\nfrom tests.support.worker_crews import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip


BUSY_PARENT = """
first, second = make_crew(3), make_crew(3)
go_to(first, "load", orders(rank1=["hang"], rank2=["have a child"]))
go_to(second, "decode", orders(rank1=["spin"]))
time.sleep(0.2)
if os.environ.get("FORK") and os.fork() == 0:
    time.sleep(1000)
print(*children(), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["SIGKILL", "SIGTERM", "SIGINT"]
)
def test_no_worker_survives_its_parent(number) -> None:
    parent = start_script(BUSY_PARENT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    try:
        assert len(pids) == 5, parent.stderr.read()
        parent.send_signal(number)
        assert wait_for(lambda: not any(is_alive(pid) for pid in pids), LIMIT_S)
        parent.communicate(timeout=LIMIT_S)
    finally:
        end_all(parent, pids)


def test_a_fork_of_the_parent_keeps_no_worker_alive(monkeypatch) -> None:
    """It holds copies of all sockets, so that their other ends see no end."""
    monkeypatch.setenv("FORK", "1")
    parent = start_script(BUSY_PARENT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    try:
        assert len(pids) == 6
        parent.kill()
        parent.wait()
        assert wait_for(lambda: sum(is_alive(pid) for pid in pids) == 1, LIMIT_S)
    finally:
        end_all(parent, pids)


def end_all(parent: subprocess.Popen[str], pids: list[int]) -> None:
    for pid in [parent.pid, *pids]:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    parent.communicate()


def test_a_parent_that_was_stopped_for_a_while_blames_nobody() -> None:
    parent = start_script("""
crew = make_crew(3, worker_timeout_s=1.0)
print("made", flush=True)
time.sleep(1.2)
go_to(crew, "decode", orders())
crew.wait_ready("step 1", 5)
print(crew.failure, flush=True)
""")
    assert parent.stdout.readline() == "made\n"
    parent.send_signal(signal.SIGSTOP)
    time.sleep(1.8)
    parent.send_signal(signal.SIGCONT)
    output, errors = parent.communicate(timeout=20)
    assert output == "None\n", errors


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.02, 0.06, 0.12])
def test_ctrl_c_while_a_crew_starts_leaves_nothing(delay_s) -> None:
    gc.collect()
    before = belongings()
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        crew = make_crew(2)
        time.sleep(5)
    timer.join()
    if "crew" in locals():
        crew.stop(LIMIT_S)
        del crew
    gc.collect()
    assert wait_for(lambda: belongings() == before), (before, belongings())


@pytest.mark.parametrize("phase", ["load", "decode"])
def test_ctrl_c_is_not_for_the_workers(phase, crew) -> None:
    go_to(crew, phase, orders(rank1=["sleep", 0.2]))
    for pid in pids_of(crew):
        os.kill(pid, signal.SIGINT)
    crew.wait_ready("load" if phase == "load" else "step 1", 5)
    assert crew.failure is None
