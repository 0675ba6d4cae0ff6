"""FP8 from the facade down: asked for, found in the directory, saved, checked and built by the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.modelopt import write_modelopt
from typer.testing import CliRunner

from lamella import LLM, QuantConfig, SamplingParams
from lamella import hlapi as older
from lamella.cli import check
from lamella.cli import main as cli
from lamella_builder import cli as builder_cli
from lamella_core.engine import Engine
from lamella_core.errors import ConfigError

PARAMS = SamplingParams(max_tokens=8)
PROMPT = "The fox lived in the old forest"


@pytest.fixture(scope="module")
def fp8_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text model as a ModelOpt FP8 checkpoint."""
    prompts = [list(range(5, 60)), list(range(100, 160))]
    return write_modelopt(model_dir, tmp_path_factory.mktemp("fp8"), prompts)


def quantization(llm: LLM) -> QuantConfig:
    return llm.engine.spec.model.quantization


def test_a_quantized_directory_is_noticed_and_saved(fp8_dir: Path, tmp_path: Path) -> None:
    own = QuantConfig("FP8", "FP8", exclude_modules=("lm_head",), activation_scheme="static")
    with LLM(fp8_dir) as llm:
        assert quantization(llm) == own
        text = llm.generate(PROMPT, PARAMS).text
        llm.save(tmp_path / "engine")
    for options in ({}, {"quant_config": {"quant_algo": "fp8"}}, {"kv_cache_config": {"dtype": "fp8"}}):
        with LLM(tmp_path / "engine", **options) as again:
            assert quantization(again) == own and again.generate(PROMPT, PARAMS).text == text


def test_an_unquantized_directory_is_quantized_when_asked(model_dir: Path) -> None:
    with LLM(model_dir, quant_config=QuantConfig("FP8"), kv_cache_config={"dtype": "fp8"}) as llm:
        assert quantization(llm) == QuantConfig("FP8", "FP8", activation_scheme="dynamic")
        assert llm.generate(PROMPT, PARAMS).text
    with LLM(model_dir, quant_config=QuantConfig("FP8", "FP8"), load_format="dummy") as llm:
        assert quantization(llm).has_static_activations
        assert len(llm.generate(PROMPT, PARAMS.replace(ignore_eos=True)).token_ids) == 8


def test_the_older_api(model_dir: Path) -> None:
    config = older.ModelConfig(model_dir)
    config.quant_config.set_fp8_qdq()
    config.quant_config.set_fp8_kv_cache()
    with older.LLM(config) as llm:
        assert quantization(llm._llm) == QuantConfig("FP8", "FP8", activation_scheme="dynamic")


@pytest.mark.parametrize("asked", [QuantConfig("FP8_PER_CHANNEL_PER_TOKEN"), QuantConfig("W4A16")])
def test_contradictions_with_a_directory(fp8_dir: Path, asked: QuantConfig) -> None:
    with pytest.raises(ConfigError, match="quant_config.quant_algo is .*leave quant_config out"):
        LLM(fp8_dir, quant_config=asked)


def test_contradictions_with_an_engine(model_dir: Path, tmp_path: Path) -> None:
    with LLM(model_dir) as llm:
        llm.save(tmp_path / "engine")
    for options, field in (
        ({"quant_config": QuantConfig("FP8")}, "quant_algo"),
        ({"kv_cache_config": {"dtype": "fp8"}}, "kv_cache_quant_algo"),
    ):
        with pytest.raises(ConfigError, match=f"differs from the engine's own: {field} is .* and there None"):
            LLM(tmp_path / "engine", **options)


@pytest.mark.parametrize("options", [["--quant", "fp8", "--kv-cache-dtype", "fp8"], []])
def test_check_judges_quantized_models_by_perplexity(
    model_dir: Path, fp8_dir: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model_dir if options else fp8_dir
    for tolerance, code, verdict in ((0.2, 0, "ok"), (1e-9, 1, "FAILED")):  # a random model's rounding weighs more
        monkeypatch.setattr(check, "QUANTIZED_PERPLEXITY_TOLERANCE", tolerance)
        done = CliRunner().invoke(cli.app, ["check", str(directory), "--max-tokens", "4", *options])
        assert done.exit_code == code, done.output
        assert len(re.findall(rf"│ {verdict} +│", done.stdout)) == 1
        assert "LlamaForCausalLM, float32, FP8, FP8" in done.stdout


def test_generate_takes_the_options(model_dir: Path) -> None:
    done = CliRunner().invoke(cli.app, ["generate", str(model_dir), PROMPT, "--quant", "fp8", "--max-tokens", "3"])
    assert done.exit_code == 0 and done.stdout.strip()
    done = CliRunner().invoke(cli.app, ["generate", str(model_dir), PROMPT, "--quant", "fp9"])
    assert isinstance(done.exception, ConfigError) and "--quant is 'FP9'" in str(done.exception)
    done = CliRunner().invoke(cli.app, ["generate", str(model_dir), PROMPT, "--kv-cache-dtype", "int8"])
    assert isinstance(done.exception, ConfigError) and "--kv-cache-dtype is 'int8'; allowed" in str(done.exception)


def test_the_builder_takes_the_options(model_dir: Path, fp8_dir: Path, tmp_path: Path) -> None:
    built = {
        "found": (fp8_dir, [], QuantConfig("FP8", "FP8", exclude_modules=("lm_head",), activation_scheme="static")),
        "asked": (model_dir, ["--quant", "fp8"], QuantConfig("FP8", activation_scheme="dynamic")),
        "dummy": (model_dir, ["--quant", "fp8", "--kv_cache_dtype", "fp8", "--load_format", "dummy"],
                  QuantConfig("FP8", "FP8")),
        "ranks": (model_dir, ["--quant", "fp8-per-channel-per-token", "--tp_size", "2", "--dtype", "bfloat16"],
                  QuantConfig("FP8_PER_CHANNEL_PER_TOKEN")),
    }  # fmt: skip
    for name, (directory, options, expected) in built.items():
        output = str(tmp_path / name)
        done = CliRunner().invoke(builder_cli.app, ["--model", str(directory), "--output_dir", output, *options])
        assert done.exit_code == 0, done.output
        assert Engine.load(output).spec.model.quantization == expected
    assert Engine.load(tmp_path / "ranks", 1).weights(1)["layers.0.mlp.down_proj.weight_scale"].dim() == 1
    done = CliRunner().invoke(
        builder_cli.app, ["--model", str(fp8_dir), "--quant", "fp8_per_channel_per_token", "--output_dir", output]
    )
    assert done.exit_code == 1 and "quant_config.quant_algo is" in done.output
