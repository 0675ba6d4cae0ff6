"""The lamella command: results on stdout, one-line errors on stderr, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.warm_python import WarmPython
from typer.testing import CliRunner

from lamella import LLM, SamplingParams
from lamella.cli import main as cli
from lamella.cli.bench.summary import distribution
from lamella.cli.doctor import findings

runner = CliRunner()


def invoke(*arguments: object):
    return runner.invoke(cli.app, [str(a) for a in arguments])


def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object):
    """Runs main() as the installed command does; returns exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["lamella", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    out, err = capsys.readouterr()
    return exit_info.value.code or 0, out, err


def test_generate_prints_the_text(model_dir: Path, llm: LLM):
    expected = llm.generate("The fox", SamplingParams(max_tokens=9)).text
    done = invoke("generate", model_dir, "The fox", "--max-tokens", 9)
    assert done.exit_code == 0
    assert done.stdout == expected + "\n"
    assert re.search(r"loaded in .* 9 tokens, .* tokens/s", done.stderr.replace("\n", " "))


def test_generate_reads_stdin_and_several_prompts(model_dir: Path, llm: LLM):
    prompts = ["The fox", "It's late"]
    expected = "".join(o.text + "\n" for o in llm.generate(prompts, SamplingParams(max_tokens=5)))
    done = runner.invoke(cli.app, ["generate", str(model_dir), "-", prompts[1], "--max-tokens", "5"], input=prompts[0])
    assert (done.exit_code, done.stdout) == (0, expected)


def test_generate_chat(model_dir: Path, llm: LLM):
    text = llm.tokenizer.apply_chat_template([{"role": "user", "content": "The fox"}])
    expected = llm.generate(text, SamplingParams(max_tokens=5, add_special_tokens=False)).text
    assert invoke("generate", model_dir, "The fox", "--chat", "--max-tokens", 5).stdout == expected + "\n"


ERRORS = {
    "no such model": (["generate", "./nope", "a"], "no directory './nope'"),
    "bad option": (["generate", "MODEL", "a", "--max-tokens", "0"], "max_tokens is 0"),
    "empty prompt": (["generate", "MODEL", ""], "prompt is empty"),
    "bad dtype": (["generate", "MODEL", "a", "--dtype", "int3"], "dtype is 'int3'"),
    "too long": (["bench", "latency", "--model", "MODEL", "--isl", "300"], "isl 300 + osl 64 = 364 tokens do not fit"),
    "report": (["bench", "latency", "--model", "MODEL", "--report-json", "/no/such/dir/x.json"], "does not exist"),
    "check": (["check", "."], "neither engine.json"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(model_dir: Path, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(model_dir) if a == "MODEL" else a for a in arguments]
    code, out, err = run_main(monkeypatch, capsys, *arguments)
    assert (code, out) == (1, "")
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in err


def test_wrong_usage_exits_with_2(monkeypatch, capsys):
    for arguments in (["generate"], ["nonsense"], ["bench", "throughput"], ["generate", "m", "p", "--top-k", "x"]):
        code, _, err = run_main(monkeypatch, capsys, *arguments)
        assert code == 2 and "Traceback" not in err


def test_version_and_help(monkeypatch, capsys):
    code, out, _ = run_main(monkeypatch, capsys, "--version")
    assert code == 0 and re.fullmatch(r"lamella \d+\.\d+\.\d+\n", out)
    code, out, _ = run_main(monkeypatch, capsys, "--help")
    assert code == 0
    for name in ("generate", "bench", "doctor", "check"):
        assert name in out


@pytest.fixture
def config_only(model_dir: Path, tmp_path: Path) -> Path:
    shutil.copy(model_dir / "config.json", tmp_path)
    return tmp_path


def test_bench_throughput_of_dummy_weights(config_only: Path, tmp_path: Path):
    report_path = tmp_path / "report.json"
    done = invoke(
        "bench", "throughput", "--hf-config", config_only, "--load-format", "dummy", "--isl", 20, "--osl", 6,
        "--num-requests", 5, "--concurrency", 2, "--dtype", "bfloat16", "--report-json", report_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    for word in ("output tokens/s", "TTFT", "TPOT", "latency", "P99", "peak memory", "torch", "LlamaForCausalLM"):
        assert word in done.stdout
    report = json.loads(report_path.read_text())
    assert report["engine"]["dtype"] == "bfloat16"
    results = report["results"]
    assert results["num_requests"] == 5
    assert results["output_throughput"] == pytest.approx(5 * 6 / results["wall_s"])
    assert results["total_throughput"] == pytest.approx(5 * 26 / results["wall_s"])
    assert 0 < results["ttft_s"]["p50"] <= results["latency_s"]["max"] <= results["wall_s"]
    assert report["peak_memory_bytes"] > 10 << 20 and report["versions"]["lamella"]


def test_bench_latency_of_a_model(model_dir: Path):
    done = invoke("bench", "latency", "--model", model_dir, "--isl", 8, "--osl", 4, "--num-requests", 2)
    assert done.exit_code == 0, done.stderr
    assert "1 in flight" in done.stdout


def test_distribution():
    values = distribution([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (values["min"], values["p50"], values["max"], values["mean"]) == (1, 3, 5, 3)
    assert values["p90"] == pytest.approx(4.6)
    assert distribution([]) is None


def test_doctor_names_what_is_there_and_what_is_missing(monkeypatch):
    done = invoke("doctor", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"processor", "memory", "torch", "transformers", "native CPU kernels", "GPU"} <= rows.keys()
    assert all(row["remedy"] for row in rows.values() if not row["ok"])
    monkeypatch.setattr("lamella.cli.doctor.is_installed", lambda module: False)
    missing = [row for row in findings() if row.name.startswith("tiktoken")]
    assert missing[0].remedy == "pip install 'lamella[tokenizers]'" and not missing[0].ok
    monkeypatch.setenv("COLUMNS", "400")
    done = invoke("doctor")
    assert done.exit_code == 0
    for extra in ("tokenizers", "mpi", "cuda"):
        assert f"pip install 'lamella[{extra}]'" in done.stdout


def test_check_passes_on_equal_models(model_dir: Path):
    done = invoke("check", model_dir, "--max-tokens", 6)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert len(re.findall(r"│ ok +│", done.stdout)) == 3
    assert "24 of 24" in done.stdout


def test_check_keeps_to_the_factors_of_short_texts(model_dir: Path, tmp_path: Path):
    directory = shutil.copytree(model_dir, tmp_path / "longrope")
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 5.0, 6.0, 7.0],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    done = invoke("check", directory, "--max-tokens", 6)
    assert done.exit_code == 0, done.stdout + done.stderr


def test_check_compares_with_an_attention_that_is_right(model_dir: Path, tmp_path: Path):
    from transformers import FalconConfig, FalconForCausalLM

    directory = tmp_path / "falcon"
    config = {"vocab_size": 420, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "alibi": True}
    FalconForCausalLM(FalconConfig(**config, initializer_range=0.5)).save_pretrained(directory)
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, directory)
    done = invoke("check", directory, "--max-tokens", 6)
    assert done.exit_code == 0, done.stdout + done.stderr


def test_check_fails_on_a_difference(model_dir: Path, monkeypatch):
    from lamella.cli import check

    original = check.load_oracle

    def disturbed(*arguments):
        oracle = original(*arguments)
        oracle._model.model.layers[0].mlp.down_proj.weight.data.mul_(3.0)
        return oracle

    monkeypatch.setattr(check, "load_oracle", disturbed)
    done = invoke("check", model_dir, "--max-tokens", 6)
    assert done.exit_code == 1
    assert "FAILED" in done.stdout and "in transformers" in done.stdout


def test_a_closed_pipe_is_no_traceback(warm_python: WarmPython):
    process = warm_python.start("from lamella.cli.main import main; main()", "doctor", "--json")
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert (process.wait(60), errors) == (1, "")


def test_brackets_in_prompts_and_paths_are_plain_text(model_dir: Path, tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "a[" / "b]"  # "[/b]" would be a closing tag
    path.parent.mkdir()
    shutil.copytree(model_dir, path)
    code, _, err = run_main(monkeypatch, capsys, "generate", path, "[/x]", "[bold]two", "--max-tokens", "2")
    assert code == 0
    assert "> [/x]\n" in err and "> [bold]two\n" in err
    options = ("--isl", "3", "--osl", "2", "--num-requests", "1")
    assert run_main(monkeypatch, capsys, "bench", "latency", "--model", path, *options)[0] == 0


def test_a_report_that_cannot_be_written_is_said_before_the_run(model_dir: Path, tmp_path: Path, monkeypatch, capsys):
    options = ("--model", model_dir, "--isl", "3", "--osl", "2", "--num-requests", "1")
    code, out, err = run_main(monkeypatch, capsys, "bench", "latency", *options, "--report-json", tmp_path)
    assert (code, out) == (1, "")
    assert "--report-json" in err and "cannot be written" in err


def test_output_that_the_terminal_cannot_encode():
    code = "import typer; from lamella.cli import main; main.app = lambda: typer.echo('a \u4e2d'); main.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a ?\n", b"")


def test_check_needs_a_text_file_of_text(model_dir: Path, tmp_path: Path, monkeypatch, capsys):
    binary = tmp_path / "text"
    binary.write_bytes(b"\x88")
    code, _, err = run_main(monkeypatch, capsys, "check", model_dir, "--text-file", binary)
    assert code == 1
    assert "not UTF-8 text" in err
