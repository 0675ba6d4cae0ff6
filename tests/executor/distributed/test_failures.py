"""A rank that dies, fails or falls silent ends its engine within seconds, with its name; the next engine works."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.executors import greedy, hf_greedy, prompt
from tests.support.sharded import open_engine, sharded_engine, threaded
from tests.support.warm_python import WarmPython
from tests.support.worker_crews import belongings, children, is_alive, wait_for

from lamella_core.errors import ConfigError, EngineDeadError, EngineFormatError, StepError, WorkerError
from lamella_core.mapping import Mapping
from lamella_executor import GenerationExecutor
from lamella_executor.distributed.store import host_store
from lamella_executor.worker.recipe import EngineRecipe, find_recipe

MODEL = ("LlamaForCausalLM", "one_kv_head")
TWO = Mapping(world_size=2, tp_size=2)
LIMIT_S = 5.0


def recipe(target: str, **arguments: object) -> EngineRecipe:
    directory = str(sharded_engine(*MODEL, 2))
    return EngineRecipe(f"tests.support.rank_targets:{target}", {"directory": directory, **arguments}, TWO, "cpu")


def worker() -> int:
    (pid,) = children()
    return pid


@pytest.fixture
def executor() -> Iterator[GenerationExecutor]:
    with open_engine(sharded_engine(*MODEL, 2), worker_timeout_s=20.0) as executor:
        assert executor.generate([5, 6], greedy(3)).outputs[0].token_ids == hf_greedy([5, 6], 3, MODEL)
        yield executor
    assert wait_for(lambda: not children())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_killed_while_rank_0_waits_in_a_collective(phase, executor, caplog):
    results = []
    if phase == "decode":
        results.append(executor.generate_async([7, 8, 9], greedy(60), streaming=True))
        next(iter(results[0]))
    os.kill(worker(), signal.SIGSTOP)
    if phase == "prefill":
        results.append(executor.generate_async(prompt(30), greedy(5)))
    else:
        time.sleep(0.3)  # until rank 0 waits in a step that decodes; the next request may not come into that
    results.append(executor.generate_async(prompt(9), greedy(5)))
    time.sleep(0.3)
    os.kill(worker(), signal.SIGKILL)
    started = time.monotonic()
    for result in results:
        with pytest.raises(EngineDeadError, match=rf"rank 1 .*was killed by signal 9 \(SIGKILL\) in phase {phase}"):
            result.result(LIMIT_S)
    assert time.monotonic() - started < LIMIT_S
    assert not executor.is_alive
    with pytest.raises(EngineDeadError, match="SIGKILL") as raised:
        executor.generate([5], greedy(1))
    assert "Traceback" not in caplog.text, "where rank 0 waited does not say why another rank died"
    assert "Read error" not in "".join(traceback.format_exception(raised.value))


def test_killed_while_idle_and_a_new_executor_afterwards(executor):
    os.kill(worker(), signal.SIGKILL)
    assert wait_for(lambda: not executor.is_alive, LIMIT_S)
    with pytest.raises(EngineDeadError, match=r"rank 1 .*was killed by signal 9 \(SIGKILL\)"):
        executor.generate([5], greedy(1))
    with open_engine(sharded_engine(*MODEL, 2)) as another:
        assert another.generate([5, 6], greedy(3)).outputs[0].token_ids == hf_greedy([5, 6], 3, MODEL)


def test_a_stopped_worker_is_named():
    with open_engine(sharded_engine(*MODEL, 2), worker_timeout_s=1.5) as executor:
        os.kill(worker(), signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"rank 1 .*has been silent for .*is stopped \(SIGSTOP\?\)"):
            executor.generate([5, 6, 7], greedy(9))
        assert time.monotonic() - started < 1.5 + LIMIT_S


def test_killed_while_loading_though_rank_0_still_loads(tmp_path: Path):
    slow = recipe("sleepy", marks=str(tmp_path), seconds=120.0)
    before = threading.active_count()
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_engine, slow)
        assert wait_for(lambda: (tmp_path / "loading1").exists() and (tmp_path / "loading0").exists(), 60)
        os.kill(worker(), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(WorkerError, match=r"rank 1 .*was killed by signal 9 \(SIGKILL\) in phase load"):
            opening.result(60)
        assert time.monotonic() - started < LIMIT_S
    assert wait_for(lambda: not children() and threading.active_count() <= before)


LOADING = """
import sys
from lamella_core.mapping import Mapping
from lamella_executor import GenerationExecutor
from lamella_executor.worker.recipe import EngineRecipe
arguments = {"directory": sys.argv[1], "marks": sys.argv[2], "seconds": 120.0}
mapping = Mapping(world_size=2, tp_size=2)
GenerationExecutor.create(EngineRecipe("tests.support.rank_targets:sleepy", arguments, mapping, "cpu"))
"""


def test_ctrl_c_while_loading_ends_everything(tmp_path: Path, warm_python: WarmPython):
    process = warm_python.start(LOADING, str(sharded_engine(*MODEL, 2)), str(tmp_path))
    marks = [tmp_path / "loading0", tmp_path / "loading1"]
    assert wait_for(lambda: all(mark.exists() and mark.read_text() for mark in marks), 90)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < LIMIT_S
    assert process.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt")
    assert wait_for(lambda: not is_alive(int(marks[1].read_text())))


@pytest.mark.parametrize(
    ("where", "error", "match"),
    [
        (1, WorkerError, r"(?s)rank 1 .*failed in phase load: ValueError: no weights for rank 1\n.*rank_targets.py"),
        (0, ValueError, "^no weights for rank 0$"),
    ],
)
def test_a_rank_that_cannot_load(where, error, match):
    host_store()  # libuv keeps a pipe for the process's life
    started = belongings()
    with pytest.raises(error, match=match):
        open_engine(recipe("broken", where=where))
    assert wait_for(lambda: belongings() == started)


def test_a_recipe_that_returns_another_rank():
    with pytest.raises(ConfigError, match=r"first_always was asked for rank 1 and returned ranks \[0\]"):
        recipe("first_always").load(1)


@pytest.mark.parametrize(
    ("target", "match"),
    [("absent", "cannot be imported here"), ("not_a_function", "is a int, not a function")],
)
def test_a_target_that_is_no_function(target, match):
    with pytest.raises(ConfigError, match=match):
        recipe(target).load(0)


def test_a_missing_file_of_another_rank(tmp_path: Path):
    directory = tmp_path / "engine"
    directory.mkdir()
    for path in sharded_engine(*MODEL, 2).iterdir():
        if path.name != "rank1.safetensors":
            (directory / path.name).symlink_to(path)
    found = find_recipe(directory)
    assert found is not None and found.load(0).ranks == [0]
    with pytest.raises(EngineFormatError, match="rank1.safetensors is missing"):
        found.load(1)


def test_an_error_of_rank_0_in_a_step_is_fatal_and_frees_the_others():
    with threaded(sharded_engine(*MODEL, 2)) as (executor, ranks):
        assert executor.generate([5, 6], greedy(2)).outputs[0].token_ids == hf_greedy([5, 6], 2, MODEL)
        groups = ranks.groups[0]
        assert groups is not None
        original, groups.tp.all_reduce = groups.tp.all_reduce, _raise
        with pytest.raises(EngineDeadError, match="rank 0 failed in phase prefill: ValueError: no sum today"):
            executor.generate([5, 6, 7], greedy(2))
        groups.tp.all_reduce = original
        assert isinstance(ranks.followers[0].exception(LIMIT_S), RuntimeError)


def _raise(x: object) -> None:
    raise ValueError("no sum today")


def test_an_error_of_another_rank_in_a_step_names_it():
    with threaded(sharded_engine(*MODEL, 4)) as (executor, ranks):

        def fail(rank: int) -> None:
            if rank == 2:
                raise KeyError("lost")

        ranks.before_step = fail
        with pytest.raises(EngineDeadError, match="rank 2 failed in phase launch: 'lost'"):
            executor.generate([5, 6, 7], greedy(2))


def _overflow(plan: object) -> bytes:
    raise OverflowError("too long")


def test_a_plan_that_cannot_be_sent_fails_its_requests_alone():
    with threaded(sharded_engine(*MODEL, 2)) as (executor, ranks):
        encoder = ranks.last_sender._encoder
        original, encoder.encode = encoder.encode, _overflow
        with pytest.raises(StepError, match="OverflowError: too long"):
            executor.generate([5, 6, 7], greedy(2))
        encoder.encode = original
        assert executor.generate([5, 6], greedy(3)).outputs[0].token_ids == hf_greedy([5, 6], 3, MODEL)
