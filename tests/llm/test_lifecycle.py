"""Clean life and death: in processes of their own, so that nothing of this one is counted."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.warm_python import WarmProcess, WarmPython

EXIT_LIMIT_S = 5
HEADER = """
import gc, sys, threading, time, warnings
warnings.simplefilter("error", ResourceWarning)
from lamella import LLM, SamplingParams
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
def slow(*args): time.sleep(0.02)
SLOW = SamplingParams(max_tokens=200, ignore_eos=True, logits_processor=slow)
def threads():
    return [t.name for t in threading.enumerate() if t is not threading.main_thread()]
def settled(limit=5.0):
    end = time.monotonic() + limit
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    return threads()
"""

# Each ends with no thread left; all run in one process, one after the other.
IN_ONE_PROCESS = """
def leaving_with():
    with LLM(model) as llm:
        llm.generate("The fox", LONG)
    assert not threads()

def progress_bars():
    with LLM(model, enable_tqdm=True) as llm:
        llm.generate(["The fox", "A"], LONG)
    assert not threads()

def leaving_with_while_requests_run():
    with LLM(model) as llm:
        running = [llm.generate_async("The fox", SLOW) for _ in range(4)]
    assert not threads()
    assert all(r.finished for r in running)

def dropping():
    llm = LLM(model)
    output = llm.generate("The fox", LONG)
    del llm
    assert output.text

def dropping_while_a_request_runs():
    llm = LLM(model)
    running = llm.generate_async("The fox", SLOW)
    del llm

def exception_in_user_code():
    try:
        with LLM(model) as llm:
            llm.generate_async("The fox", SLOW)
            raise KeyError("mine")
    except KeyError as error:
        assert error.args == ("mine",)
    assert not threads()

def failed_construction():
    try:
        LLM(model, tokenizer="./missing")
    except ValueError:
        pass
    assert not threads()

def five_in_a_row():
    for _ in range(5):
        with LLM(model) as llm:
            llm.generate("The fox", SamplingParams(max_tokens=2))
    assert not threads()

def two_at_once():
    one, two = LLM(model), LLM(model)
    assert one.generate("The fox", LONG).text == two.generate("The fox", LONG).text
    assert len(threads()) == 2
    one.shutdown()
    assert two.generate("The fox", LONG).text
    two.shutdown()
    assert not threads()

for scenario in (leaving_with, leaving_with_while_requests_run, dropping, dropping_while_a_request_runs,
                 exception_in_user_code, failed_construction, five_in_a_row, two_at_once):
    scenario()
    gc.collect()
    assert not settled(), (scenario, threads())
"""

SCENARIOS = {
    "all kinds of ends": IN_ONE_PROCESS,
    "no close": "llm = LLM(model); llm.generate('The fox', LONG)",
    "no close, requests running": "llm = LLM(model); running = llm.generate_async('The fox', SLOW)",
}


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    python = WarmPython("lamella.llm")
    yield python
    python.close()


def start(python: WarmPython, code: str, model_dir: Path) -> WarmProcess:
    return python.start(f"model = {str(model_dir)!r}\n{HEADER}\n{code}\nprint('end', flush=True)\n")


def wait_for_line(process: WarmProcess, line: str) -> None:
    assert process.stdout is not None and process.stderr is not None
    found = process.stdout.readline().strip()
    assert found == line, process.stderr.read()


def exit_time(process: WarmProcess) -> float:
    begin = time.monotonic()
    try:
        process.wait(EXIT_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the process lives {EXIT_LIMIT_S} s after its last statement")
    return time.monotonic() - begin


@pytest.mark.parametrize("code", SCENARIOS.values(), ids=SCENARIOS)
def test_process_ends(python: WarmPython, model_dir: Path, code: str):
    with start(python, code, model_dir) as process:
        wait_for_line(process, "end")
        exit_time(process)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()


CTRL_C = """
llm = LLM(model)
print("ready", flush=True)
try:
    llm.generate(["The fox"] * 8, SLOW)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    assert llm.generate("The fox", SamplingParams(max_tokens=2)).token_ids  # it still serves
    assert llm.get_stats()[-1].num_running <= 1, "the eight run on"
"""


def test_ctrl_c_in_generate_aborts_and_raises(python: WarmPython, model_dir: Path):
    with start(python, CTRL_C, model_dir) as process:
        wait_for_line(process, "ready")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        wait_for_line(process, "interrupted")
        assert time.monotonic() - begin < EXIT_LIMIT_S
        wait_for_line(process, "end")
        exit_time(process)
        assert process.returncode == 0


def test_uncaught_ctrl_c_ends_the_process(python: WarmPython, model_dir: Path):
    code = "with LLM(model) as llm:\n    print('ready', flush=True)\n    llm.generate('The fox', SLOW)"
    with start(python, code, model_dir) as process:
        wait_for_line(process, "ready")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        exit_time(process)
        assert process.returncode not in (0, None)
