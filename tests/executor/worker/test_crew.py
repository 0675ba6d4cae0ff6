"""Crew: workers start, hear, answer and end, and nothing of them is left."""

from __future__ import annotations

import ast
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.support.worker_crews import (
    belongings,
    is_alive,
    make_crew,
    orders,
    pids_of,
    wait_for,
)

from lamella_core.errors import ConfigError, WorkerError
from lamella_executor.worker.channel import STEP
from lamella_executor.worker.local import LocalLauncher, worker_environment
from lamella_executor.worker.messages import Load, Start

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    gc.collect()
    before = belongings()
    yield
    gc.collect()
    assert wait_for(lambda: belongings() == before), (before, belongings())


@pytest.fixture
def crew(request):
    crew = make_crew(getattr(request, "param", 2))
    yield crew
    crew.stop(5.0)


def messages(caplog, name: str) -> list[str]:
    """Waits for log records of a worker."""
    assert wait_for(lambda: any(record.name.endswith(name) for record in caplog.records))
    return [record.getMessage() for record in caplog.records if record.name.endswith(name)]


@pytest.mark.parametrize("crew", [3], indirect=True)
def test_all_workers_load_start_and_step(crew) -> None:
    crew.broadcast(Load("m:f", b"{}"))
    crew.wait_ready("load", 5)
    crew.broadcast(Start(b"{}"))
    crew.wait_ready("start", 5)
    for number in (1, 2, 3):
        crew.broadcast_frame(STEP, orders())
        crew.wait_ready(f"step {number}", 5)
    crew.stop(5)
    assert crew.failure is None
    with pytest.raises(WorkerError, match="were stopped"):
        crew.broadcast(Start(b"{}"))


def test_each_worker_is_told_who_it_is(caplog) -> None:
    class OtherDevices(LocalLauncher):
        def __init__(self, world_size: int) -> None:
            super().__init__(world_size)
            self.device_indices = {0: 0, 1: 4, 2: 1}

    crew = make_crew(3, launcher=OtherDevices(3), serve="tests.support.worker_tasks:show_setup")
    for rank, index in ((1, 4), (2, 1)):
        mapping = {"world_size": 3, "rank": rank}
        expected = f"rank {rank} of 3 has device {index}, mapping {mapping}"
        assert messages(caplog, f"rank{rank}") == [f"tests: {expected}"]
    crew.stop(5)


def test_nothing_heavy_is_imported_before_rank_0_is_greeted(crew, caplog) -> None:
    crew.broadcast_frame(STEP, orders(rank1=["show"]))
    (text,) = messages(caplog, "rank1")
    modules = ast.literal_eval(text.removeprefix("tests: modules "))
    assert "msgspec" in modules
    assert not {"torch", "numpy", "transformers", "pickle"} & set(modules)


def test_what_a_worker_writes_goes_to_stderr_marked_with_its_rank(crew, capfd) -> None:
    crew.broadcast_frame(STEP, orders(rank1=["write", 1, "one\ntw"]))
    crew.broadcast_frame(STEP, orders(rank1=["write", 2, "o\n"]))
    written = []

    def has_come() -> bool:
        out, err = capfd.readouterr()
        assert out == ""
        written.append(err)
        return "two" in "".join(written)

    assert wait_for(has_come)
    assert "".join(written) == "[rank 1] one\n[rank 1] two\n"
    crew.broadcast_frame(STEP, orders(rank1=["write", 2, "the rest"]))
    crew.stop(5)
    assert capfd.readouterr().err == "[rank 1] the rest\n"


@pytest.mark.parametrize("deed", [["write", 2, "x" * 99 + "\n", 10**9], ["log", 30, "x", 10**9]], ids=["write", "log"])
def test_a_worker_that_talks_without_end_hides_no_death(deed, capfd, caplog) -> None:
    caplog.set_level(logging.CRITICAL, "lamella_executor.worker")
    crew = make_crew(3)
    crew.broadcast_frame(STEP, orders(rank1=deed, rank2=["signal", signal.SIGKILL, 0.2]))
    error = crew.await_failure(5)
    assert str(error).startswith("rank 2 ")
    crew.stop(5)


def test_a_worker_that_writes_a_lot_is_not_held_up(crew, capfd) -> None:
    crew.broadcast_frame(STEP, orders(rank1=["write", 2, "x" * 99 + "\n", 20_000]))
    crew.wait_ready("step 1", 10)
    assert capfd.readouterr().err.count("[rank 1] " + "x" * 99) > 1000


def test_two_crews_at_once_do_not_meet() -> None:
    first, second = make_crew(2), make_crew(3)
    first.broadcast_frame(STEP, orders(rank1=["exit", 3]))
    assert "exited with code 3" in str(first.await_failure(5))
    second.broadcast_frame(STEP, orders())
    second.wait_ready("step 1", 5)
    assert second.failure is None
    first.stop(5)
    second.stop(5)


def test_a_worker_holds_no_descriptor_but_its_own(crew) -> None:
    """Another crew's sockets would keep its workers alive when this process dies."""
    with socket.socketpair()[0], socket.create_server(("127.0.0.1", 0)):
        other = make_crew(3)
        for pid in pids_of(other):
            links = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            assert links.pop("0") == "/dev/null"
            assert links.pop("1") == links.pop("2")  # the pipe to rank 0
            sockets = [link for link in links.values() if link.startswith("socket:")]
            assert len(sockets) == 1, links
        other.stop(5)


def test_a_worker_leads_a_session_of_its_own(crew) -> None:
    (pid,) = pids_of(crew)
    assert os.getsid(pid) == pid


def test_no_module_is_found_where_the_worker_happens_to_run(tmp_path, monkeypatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    make_crew(2).stop(5)


def test_a_worker_finds_the_modules_that_this_process_finds(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_module.py").write_text("def serve(channel, setup, state):\n    channel.receive()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    crew = make_crew(2, serve="my_module:serve")
    crew.stop(5)
    assert crew.failure is None


def test_the_environment_is_added_to_this_one(monkeypatch) -> None:
    monkeypatch.setenv("A_SETTING", "here")
    path = worker_environment({"PYTHONPATH": "/first", "B": "2"})["PYTHONPATH"].split(os.pathsep)
    assert path[0] == "/first"
    assert path[1:] == [entry or os.getcwd() for entry in sys.path]
    found = worker_environment({"A_SETTING": "there"})
    assert (found["A_SETTING"], found["PATH"]) == ("there", os.environ["PATH"])


class TestStop:
    def test_is_idempotent_and_quick(self, crew) -> None:
        started = time.monotonic()
        for _ in range(3):
            crew.stop(30.0)
        assert time.monotonic() - started < 15.0

    def test_kills_who_does_not_listen(self) -> None:
        crew = make_crew(3)
        pids = pids_of(crew)
        crew.broadcast_frame(STEP, orders(rank2=["hang"]))
        os.kill(pids[0], signal.SIGSTOP)
        crew.stop(1.0)
        assert crew.failure is None
        assert not any(is_alive(pid) for pid in pids)

    def test_ends_what_a_worker_has_started(self, crew, caplog) -> None:
        crew.broadcast_frame(STEP, orders(rank1=["have a child"]))
        child = int(messages(caplog, "rank1")[0].split()[-1])
        assert is_alive(child)
        crew.stop(5.0)
        assert wait_for(lambda: not is_alive(child))

    def test_may_be_called_by_many_threads(self, crew) -> None:
        threads = [threading.Thread(target=crew.stop, args=(5.0,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def test_during_the_call_about_a_failure_does_not_wait_for_itself(self) -> None:
        crews, called = [], threading.Event()

        def on_failure(error: WorkerError) -> None:
            crews[0].stop(5.0)
            called.set()

        crews.append(make_crew(2, on_failure=on_failure))
        crews[0].broadcast_frame(STEP, orders(rank1=["exit", 1]))
        assert called.wait(5)
        crews[0].stop(5.0)

    def test_frees_who_waits_for_the_workers(self, crew) -> None:
        threading.Timer(0.1, crew.stop, (5.0,)).start()
        with pytest.raises(WorkerError, match="were stopped"):
            crew.wait_ready("load", 30)


def test_a_crew_that_is_dropped_ends_its_workers() -> None:
    crew = make_crew(3)
    pids = pids_of(crew)
    del crew
    gc.collect()
    assert wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_fifty_crews_leave_nothing_behind() -> None:
    before = belongings()
    for number in range(50):
        crew = make_crew(2)
        if number % 5 == 0:
            crew.broadcast_frame(STEP, orders(rank1=["signal", signal.SIGKILL]))
            assert crew.await_failure(5) is not None
        if number % 5 == 1:
            del crew
        else:
            crew.stop(5.0)
    gc.collect()
    assert wait_for(lambda: belongings() == before), (before, belongings())


def run_script(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    prelude = "import os, sys, time\nfrom tests.support.worker_crews import *\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + text, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=30
    )


@pytest.mark.parametrize("last", ["", "raise SystemExit(0)", "import gc; crew.me = crew"], ids=["end", "exit", "cycle"])
def test_the_interpreter_ends_though_a_crew_is_alive(last) -> None:
    done = run_script(f"crew = make_crew(3); print(*pids_of(crew))\n{last}")
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(is_alive(int(pid)) for pid in done.stdout.split())


def test_a_fork_that_ends_leaves_the_workers_to_their_owner() -> None:
    done = run_script("""if True:
        from lamella_executor.worker.channel import STEP
        crew = make_crew(2)
        pid = os.fork()
        if pid == 0:
            crew.stop(5.0)
            sys.exit(0)
        print(os.waitpid(pid, 0)[1])
        crew.broadcast_frame(STEP, orders())
        crew.wait_ready("step 1", 5)
        print("alive", crew.failure)
    """)
    assert done.stdout.split() == ["0", "alive", "None"], done


class TestStartsThatFail:
    def test_a_serve_function_that_is_not_there(self) -> None:
        crew = make_crew(2, serve="tests.support.worker_tasks:nowhere")
        assert "ConfigError: Setup.serve is 'tests.support.worker_tasks:nowhere'" in str(crew.await_failure(5))
        crew.stop(5)

    def test_an_interpreter_that_is_not_there(self, monkeypatch) -> None:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(WorkerError, match="rank 1 could not be started.*/nowhere/python"):
            make_crew(3)

    def test_the_second_of_two_workers(self, monkeypatch) -> None:
        popen, started = subprocess.Popen, []

        def start(*arguments, **options):
            if started:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            started.append(popen(*arguments, **options))
            return started[0]

        monkeypatch.setattr(subprocess, "Popen", start)
        with pytest.raises(WorkerError, match="rank 2 could not be started.*unavailable"):
            make_crew(3)
        assert not is_alive(started[0].pid)

    def test_a_worker_that_cannot_even_begin(self, tmp_path) -> None:
        (tmp_path / "msgspec.py").write_text("raise ImportError('broken installation')")
        with pytest.raises(WorkerError, match="(?s)exited with code 1 in phase launch.*broken installation"):
            make_crew(2, environment={"PYTHONPATH": str(tmp_path)})

    @pytest.mark.parametrize("name", ["worker_timeout_s", "stall_timeout_s"])
    @pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "30", True])
    def test_a_timeout_that_is_none(self, name, value) -> None:
        with pytest.raises(ConfigError, match=name):
            make_crew(2, **{name: value})

    def test_by_hand(self) -> None:
        done = subprocess.run([sys.executable, "-m", "lamella_executor.worker"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "Started by a launcher" in done.stderr


def test_not_ready_in_time_names_who_and_where() -> None:
    crew = make_crew(3, worker_timeout_s=0.4)
    crew.broadcast(Load("m:f", orders(rank2=["hang"])))
    with pytest.raises(WorkerError, match=r"not ready with load after 1 s: rank 2 \(pid \d+\) at ") as caught:
        crew.wait_ready("load", 1.0)
    assert "rank 1" not in str(caught.value)
    assert str(crew.failure) == str(caught.value)
    crew.stop(5)
