"""The Makefile's own decisions, with a stand-in for the environment's Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("has_gpu", [False, True])
def test_gpu_tests_do_not_pass_by_being_skipped(tmp_path, has_gpu):
    check = "exit 0" if has_gpu else f'exec {sys.executable} "$@"'
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\ncase "$1" in -c) {check};; esac\necho "ran: $*"\n')
    python.chmod(0o755)
    for stamp in (".runtime", ".dev"):  # later than what they are made from: nothing is installed
        (tmp_path / stamp).touch()
    done = subprocess.run(
        ["make", "-C", ROOT, "test-gpu", f"VENV={tmp_path}"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert ("ran: -m pytest -m gpu" in done.stdout) == (done.returncode == 0) == has_gpu
    assert ("no CUDA device to test on: " in done.stderr) != has_gpu
