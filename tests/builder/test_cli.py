"""lamella-build: a directory in, an engine out; plans, mistakes and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.tiny_models import hf_dir
from typer.testing import CliRunner, Result

from lamella_builder import cli
from lamella_builder.steps import memory
from lamella_core.engine import Engine
from lamella_core.models.llama import LlamaForCausalLM


@pytest.fixture
def model() -> Path:
    return hf_dir("LlamaForCausalLM", "grouped")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def failed(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


def test_a_model_becomes_an_engine(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    result = run("--model", model, "--output_dir", out, "--max-batch-size", 3, "--max_seq_len", 32, "--dtype", "bf16",
                 "--kv_cache_type", "continuous", "--max-beam-width", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("memory plan", "weights per rank", "KV tokens that fit here", "memory available", "choose kernels",
                 "write engine", "total", f"engine written to {out}"):  # fmt: skip
        assert text in result.output
    engine = Engine.load(out)
    build = engine.spec.build
    assert (build.max_batch_size, build.max_seq_len, build.max_beam_width) == (3, 32, 2)
    assert (build.kv_cache_type, engine.spec.model.dtype) == ("continuous", "bfloat16")
    assert {"read weights", "choose kernels"} <= engine.spec.step_seconds.keys()


def test_dry_run_prints_the_plan_and_stops(model: Path, tmp_path: Path) -> None:
    for spelling in ("--dry-run", "--dry_run"):
        result = run("--model", model, "--output-dir", tmp_path / "engine", spelling)
        assert result.exit_code == 0 and "memory plan" in result.output and "seconds" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_dry_run_needs_the_configuration_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert run("--model", tmp_path, "--dry_run").exit_code == 0


def test_dummy_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    result = run("--model", tmp_path, "--load-format", "dummy", "--output_dir", tmp_path / "engine")
    assert result.exit_code == 0, result.output
    assert "no weights" in failed(run("--model", tmp_path, "--output_dir", tmp_path / "other"), 1)
    assert not (tmp_path / "other").exists()


def test_ranks_are_written_one_after_another(model: Path, tmp_path: Path) -> None:
    result = run("--model", model, "--output_dir", tmp_path / "engine", "--tp_size", 2, "--pp-size", 2)
    assert result.exit_code == 0 and "4 ranks and needs as many processes" in " ".join(result.output.split())
    files = sorted(path.name for path in (tmp_path / "engine").glob("*.safetensors"))
    assert files == [f"rank{rank}.safetensors" for rank in range(4)]
    weights = [Engine.load(tmp_path / "engine", rank).weight_bytes(rank) for rank in range(4)]
    assert max(weights) < LlamaForCausalLM.from_hugging_face(model).weight_bytes() / 2


def test_a_checkpoint_becomes_an_engine(model: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_hugging_face(model).save_checkpoint(tmp_path / "checkpoint")
    checkpoint = ("--checkpoint_dir", tmp_path / "checkpoint", "--output_dir", tmp_path / "engine")
    assert run(*checkpoint).exit_code == 0
    assert Engine.load(tmp_path / "engine").spec.model.architecture == "LlamaForCausalLM"
    assert "was made for 1 rank, tp_size 1 x pp_size 1" in failed(run(*checkpoint, "--tp_size", 2), 1)
    assert "is an engine already" in failed(run("--model", tmp_path / "engine"), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_seq_len", "100"], "max_seq_len 100 exceeds the model's 64 positions"),
        (["--max_batch_size", "0"], "max_batch_size is 0"),
        (["--kv_cache_type", "page"], "did you mean 'paged'"),
        (["--dtype", "float17"], "dtype is 'float17'"),
        (["--load_format", "dumy"], "load_format is 'dumy'"),
        (["--log_level", "loud"], "--log_level is 'loud'"),
        (["--tp_size", "3"], "tp_size 3 does not divide num_attention_heads 4"),
        (["--pp_size", "0"], "pp_size is 0"),
    ],
)
def test_wrong_values_exit_with_1(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in failed(run("--model", model, "--output_dir", tmp_path / "engine", *arguments), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--model", "--checkpoint_dir"])
def test_an_empty_name_is_one_error(option: str) -> None:
    assert "no directory ''" in failed(run(option, ""), 1)


@pytest.mark.parametrize("arguments", [[], ["--model", "a", "--checkpoint_dir", "b"], ["--modle", "a"],
                                       ["--model", "a", "--max_batch_size", "many"]])  # fmt: skip
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    failed(run(*arguments), 2)


def test_an_impossible_plan_is_shown_and_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    arguments = ("--model", model, "--output_dir", tmp_path / "engine", "--max_num_tokens", 10**8)
    for extra in ((), ("--dry_run",)):
        message = failed(run(*arguments, *extra), 1)
        assert "memory plan" in message and "1.00 GiB are free. Lower max_seq_len" in message
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_directory_is_one_error(tmp_path: Path) -> None:
    message = failed(run("--model", tmp_path / "none", "--output_dir", tmp_path / "engine"), 1)
    assert "pass an existing local directory" in message and not (tmp_path / "engine").exists()


def test_an_output_directory_in_use_is_refused_and_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not an engine's (thesis.txt)" in failed(run("--model", model, "--output_dir", tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_weights_are_one_error_and_leave_nothing(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(
        json.dumps({**json.loads((model / "config.json").read_text()), "num_hidden_layers": 1})
    )
    (source / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    message = failed(run("--model", source, "--output_dir", tmp_path / "engine"), 1)
    assert "9 unexpected" in message and "model.layers.1.self_attn.q_proj.weight" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_help_does_not_import_torch() -> None:
    code = "import sys; from lamella_builder import cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    shown = run("--help").output
    assert "--max_batch_size" in shown and "--max-batch-size" in shown and "--dtype, --dtype" not in shown
