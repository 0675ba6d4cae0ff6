"""Every example runs as a user runs it, on the bundled demo model; most with PyTorch imported before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.warm_python import WarmPython

EXAMPLES = Path(__file__).parents[2] / "examples"
SAME_PROCESS = Path(__file__).parents[1] / "support" / "same_process.py"
DEMO = EXAMPLES / "demo_model" / "demo-4m"
MAX_LINES = 100


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def run(script: str, *arguments: object, cwd: Path) -> str:
    """Runs an example in another directory and returns what it printed; it must end by itself, without an error."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


Run = Callable[..., str]


@pytest.fixture
def run_warm(warm_python: WarmPython) -> Run:
    """Does what `run` does, but PyTorch is imported when the script begins."""

    def run(script: str, *arguments: object, cwd: Path, same_process: bool = False) -> str:
        """``same_process``: Python scripts that it starts run in its own process."""
        path = EXAMPLES / script
        given = [str(path), *map(str, arguments)] if same_process else [*map(str, arguments)]
        path = SAME_PROCESS if same_process else path
        done = warm_python.run(path.read_text(), *given, path=path, cwd=cwd, env=environment(), timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_example_is_run_and_short():
    source = Path(__file__).read_text()
    assert '"run_examples.py"' in source  # which runs llm_examples.py
    for path in EXAMPLES.glob("*.py"):
        assert path.name in (*source.split('"'), "llm_examples.py"), f"no test runs {path.name}"
        assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_quickstart(tmp_path: Path):
    out = run("quickstart.py", cwd=tmp_path)
    assert re.search(r"^load \d+\.\d+ s, time to first token \d+ ms, \d+ tokens/s$", out, re.M)
    story = out.split("\n\n")[0]
    assert story.startswith("Once upon a time, a little fox named") and len(story.split()) > 25
    assert "12" in out


def test_low_level_chain(tmp_path: Path, run_warm: Run):
    arguments = ("--hf_model_dir", DEMO, "--engine_dir", tmp_path / "engine")
    first = run_warm("llama.py", *arguments, cwd=tmp_path)
    assert "built: " in first and "choose kernels" in first and "Once upon a time, a" in first
    second = run_warm("llama.py", *arguments, cwd=tmp_path)  # finds the engine
    assert "built: " not in second
    assert second == first.split("\n", 1)[1]


def test_low_level_chain_of_two_ranks(tmp_path: Path, run_warm: Run):
    arguments = ("--hf_model_dir", DEMO, "--engine_dir", tmp_path / "engine", "--tp_size", 2)
    out = run_warm("llama_multi_gpu.py", *arguments, cwd=tmp_path)
    assert re.search(r"^rank 1: \d+\.\d MiB of weights$", out, re.M) and "Once upon a time, a little" in out


@pytest.mark.slow
def test_distributed_inference(tmp_path: Path, run_warm: Run):
    out = run_warm("llm_inference_distributed.py", "--tp_size", 1, "--pp_size", 2, cwd=tmp_path)
    assert "2 ranks: tp_size 1 x pp_size 2" in out and "a little fox named Bruno" in out


def test_async_streaming(tmp_path: Path, run_warm: Run):
    out = run_warm("async_streaming.py", cwd=tmp_path)
    assert out.count("[finished, ") == 2 and out.count("[cancelled, ") == 1


def test_custom_tokenizer(tmp_path: Path, run_warm: Run):
    out = run_warm("custom_tokenizer.py", cwd=tmp_path)
    assert "text '', equal ids: True" in out and re.search(r"^\d+ tokens encoded$", out, re.M)


def test_dummy_benchmark(tmp_path: Path, run_warm: Run):
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())  # no weights there
    out = run_warm(
        "dummy_benchmark.py", "--hf_config_dir", tmp_path, "--num_requests", 3, "--output_len", 8, cwd=tmp_path
    )
    assert re.search(r"^24 tokens in \d+\.\d+ s: \d+\.\d tokens/s$", out, re.M)


@pytest.mark.slow
def test_tasks_of_the_older_api(tmp_path: Path, run_warm: Run):
    out = run_warm("run_examples.py", "run_single_gpu", cwd=tmp_path, same_process=True)
    tasks = re.findall(r"^== (\w+)", out, re.M)
    assert set(tasks) == {
        "run_llm_from_huggingface_model", "run_llm_from_tllm_engine", "run_llm_generate",
        "run_llm_generate_async_example", "run_llm_with_async_future",
    }  # fmt: skip
    updates = sorted(map(int, re.findall(r"^(\d+) updates: ", out, re.M)))
    assert updates[0] == 1 and updates[-1] > 1, "one at the end, or as they come (a busy machine joins some)"
    stories = re.findall(r", a little pig .*$", out, re.M)
    assert len(set(stories)) == 1 and len(stories) == 5  # HF directory and engine, streamed or not: the same text


@pytest.mark.slow
def test_tasks_of_the_older_api_on_two_ranks(tmp_path: Path):
    out = run("run_examples.py", "run_multi_gpu", cwd=tmp_path)
    assert re.findall(r"^== (\w+)", out, re.M) == ["run_llm_on_tensor_parallel", "run_llm_with_auto_parallel"]
    assert len(re.findall(r", a little pig .*$", out, re.M)) == 2
