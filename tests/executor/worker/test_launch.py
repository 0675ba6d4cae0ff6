"""lamella-launch: an MPI job whose first rank runs the script and whose other ranks hold its workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.launched_script import EXIT_CODE

from lamella_core.errors import ConfigError
from lamella_executor.worker.agents.detection import mpi_place
from lamella_executor.worker.launchers import check_started_once

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).parents[2] / "support" / "launched_script.py"
AS_ROOT = [f"{owner}_ALLOW_RUN_AS_ROOT{suffix}" for owner in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")]
MPIRUN = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="no mpirun here; pip install 'lamella-executor[mpi]'")


def start_job(task: str, num_ranks: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, **{name: "1" for name in AS_ROOT}, "OMP_NUM_THREADS": "1"}
    options = ["--bind-to", "none"]
    if "Open MPI" in subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, env=environment).stdout:
        options.append("--oversubscribe")
    launch = [sys.executable, "-m", "lamella_executor.worker.agents.launch"]
    script = [sys.executable, str(SCRIPT), str(num_ranks), task]
    return subprocess.Popen(
        [MPIRUN, "-n", str(num_ranks), *options, *launch, *script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@needs_mpi
def test_a_script_has_sessions_on_other_ranks_and_survives_a_killed_worker() -> None:
    job = start_job("sessions")
    output, errors = job.communicate(timeout=60)
    assert job.returncode == EXIT_CODE, errors
    seen = json.loads(output)
    assert "rank 1 (pid " in seen["killed"] and "signal 9 (SIGKILL) in phase load" in seen["killed"]
    assert seen["failures"] == 1
    assert "3 ranks needs 3 processes, lamella-launch was started with 2" in seen["too_large"]
    assert "mpirun -n 3 lamella-launch" in seen["too_large"]


@needs_mpi
def test_nothing_outlives_a_killed_script_not_even_a_stopped_worker() -> None:
    job = start_job("orphan")
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGKILL, errors
    seen = json.loads(output)
    assert seen["state"] == "it is stopped (SIGSTOP?)"
    assert wait_until_gone(seen["worker"], timeout_s=5.0)


@needs_mpi
def test_a_signal_to_the_agent_is_the_scripts_to_answer() -> None:
    job = start_job("wait_for_signal")
    started = json.loads(job.stdout.readline())
    os.kill(started["agent"], signal.SIGTERM)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == EXIT_CODE, errors
    assert json.loads(output) == {"signal": signal.SIGTERM}
    assert wait_until_gone(started["script"], timeout_s=5.0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "multi-node session, got 1"),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, "multi-node session, got 3"),
        ({"PMIX_RANK": "1"}, "multi-node session, got 1"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "multi-node session, got 1"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"},
            "started 6 times on several machines",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "started 2 times on several machines",
        ),
    ],
)
def test_a_script_that_was_started_several_times_is_told_of_lamella_launch(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        check_started_once(environment)
    assert "lamella-launch" in str(raised.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},  # a batch script, which runs once
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    ],
)
def test_a_script_that_was_started_once_on_its_machine_may_start_workers(environment: dict[str, str]) -> None:
    check_started_once(environment)


def test_the_place_of_a_step_of_slurm_is_known() -> None:
    place = mpi_place({"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"})
    assert (place.rank, place.size, place.num_local) == (4, 6, 2)
