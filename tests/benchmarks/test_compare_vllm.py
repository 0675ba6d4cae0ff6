"""The comparison with vLLM: one workload for both engines, with a stand-in for vLLM, and its errors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tests.support.tiny_models import write_config
from typer.testing import CliRunner

from lamella import LLM
from lamella.cli import main as cli

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compare_vllm.py"
SAME = ("--isl", "5", "--osl", "4", "--seed", "7")
Asked = list[tuple[list[int], int]]  # token ids and max_tokens of each request


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_vllm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config_dir(tmp_path) -> Path:
    return write_config(tmp_path / "model")


def parsed(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object):
    monkeypatch.setattr(sys, "argv", ["compare_vllm.py", *map(str, arguments)])
    return script.parse()


def vllm_stand_in(asked: Asked, options: dict) -> ModuleType:
    class FakeLLM:
        def __init__(self, **given):
            options.update(given)

        def generate(self, prompts, params, use_tqdm):
            asked.extend((prompt["prompt_token_ids"], params.max_tokens) for prompt in prompts)
            outputs = [SimpleNamespace(token_ids=[0] * params.max_tokens)]
            return [SimpleNamespace(outputs=outputs) for _ in prompts]

    module = ModuleType("vllm")
    module.LLM, module.__version__ = FakeLLM, "0"
    module.SamplingParams = lambda **given: SimpleNamespace(**given)
    return module


@pytest.mark.parametrize(
    ("mode", "sizes", "num_measured"),
    [("throughput", ("--num-requests", "3"), 3), ("latency", ("--batch-size", "2", "--num-runs", "2"), 8)],
)
def test_both_engines_get_the_same_ids(script, config_dir, monkeypatch, mode, sizes, num_measured):
    ours: Asked = []
    theirs: Asked = []
    options: dict = {}
    submit = LLM.generate_async

    def recorded(self, prompt, params):
        ours.append((prompt, params.max_tokens))
        return submit(self, prompt, params)

    monkeypatch.setattr(LLM, "generate_async", recorded)
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in(theirs, options))
    command = ["bench", mode, "--hf-config", str(config_dir), "--load-format", "dummy", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*command, *SAME, *sizes])
    assert done.exit_code == 0, done.stderr
    more = ("--vllm", '{"max_num_seqs": 9}')
    script.measure_vllm(parsed(script, monkeypatch, "--mode", mode, "--hf-config", config_dir, *SAME, *sizes, *more))
    assert ours[-num_measured:] == theirs[-num_measured:]
    assert len({tuple(prompt) for prompt, _ in theirs}) > 2 and options["max_num_seqs"] == 9


@pytest.mark.parametrize(("value", "message"), [("{max_num_seqs: 1}", "is no JSON ("), ("[1]", "is no JSON object")])
def test_bad_keywords_are_refused_before_anything_runs(script, monkeypatch, capsys, value, message):
    monkeypatch.setattr(script, "measure_lamella", lambda args, path: pytest.fail("Lamella ran"))
    monkeypatch.setattr(sys, "argv", ["compare_vllm.py", "--hf-config", "somewhere", "--vllm", value])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "argument --vllm: " + repr(value) in (err := capsys.readouterr().err) and message in err


def test_a_failing_run_of_lamella_ends_with_its_error(script, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compare_vllm.py", "--hf-config", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    error, ours = capfd.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert error.startswith(f"error: {tmp_path} ")
    assert ours == "Lamella failed with exit code 1; its messages are above"
