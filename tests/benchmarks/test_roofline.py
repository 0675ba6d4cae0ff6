"""The roofline: tables computed beforehand, and what follows from the formulae for other shapes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.tiny_models import TINY, write_config

from lamella.roofline import PREFILL_ATTENTION_EFFICIENCY, Hardware, LayerAttention, ModelShape, Roofline, find_hardware
from lamella_core import AutoConfig
from lamella_core.errors import ConfigError
from lamella_core.quantization.config import QuantConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
H100 = find_hardware("NVIDIA H100 80GB HBM3")
FP8_WEIGHTS = QuantConfig(quant_algo="FP8")
FP8 = QuantConfig(quant_algo="FP8", kv_cache_quant_algo="FP8")

# Llama-3.1-8B on an H100 of 3.0 TB/s, 800 and 1500 TFLOP/s: (serial, overlap, requests at once), for 16-bit weights and
# KV, fp8 weights, fp8 weights and KV.
THROUGHPUT = {
    (128, 128): ((22452, 27678, 2498), (35313, 50231, 2775), (41471, 50231, 5550)),
    (128, 2048): ((14245, 16035, 416), (16246, 17813, 463), (27490, 35627, 925)),
    (128, 4096): ((8451, 8490, 220), (9406, 9432, 245), (17107, 18864, 490)),
    (500, 2000): ((11270, 12316, 320), (12730, 13682, 355), (21846, 27364, 710)),
    (1000, 1000): ((9786, 12317, 320), (11640, 13683, 355), (18821, 27365, 710)),
    (1000, 2000): ((8532, 9237, 240), (9719, 10262, 266), (16895, 20524, 533)),
    (2048, 128): ((2453, 3204, 227), (3758, 5755, 252), (4547, 5755, 505)),
    (2048, 2048): ((5417, 6014, 156), (6255, 6682, 173), (11372, 13363, 347)),
    (5000, 500): ((2082, 3520, 91), (2698, 3911, 101), (4119, 7821, 203)),
}
STEPS_MS = {  # context 1024, by batch
    "bf16": {1: 5.05, 8: 5.36, 32: 6.43, 64: 7.87, 128: 10.7, 256: 16.5},
    "fp8": {1: 2.70, 8: 2.86, 32: 3.39, 64: 4.11, 128: 5.54, 256: 8.46, 512: 16.9},
}
FLOORS_MS = {("bf16", 3.0e12): 5.01, ("bf16", 3.35e12): 4.49, ("fp8", 3.0e12): 2.68, ("fp8", 3.35e12): 2.40}


@pytest.fixture(scope="module")
def llama():
    return AutoConfig.from_hugging_face(BENCHMARKS / "configs" / "llama-3.1-8b")


@pytest.fixture(scope="module")
def rooflines(llama):
    schemes = {"bf16": QuantConfig(), "fp8 weights": FP8_WEIGHTS, "fp8": FP8}
    return {name: Roofline(ModelShape.of(replace(llama, quantization=q)), H100) for name, q in schemes.items()}


def test_shape_of_llama(rooflines):
    model = rooflines["bf16"].model
    assert (model.linear_params, model.head_params) == (6_979_321_856, 525_336_576)
    assert (model.kv_bytes, rooflines["fp8"].model.kv_bytes) == (131_072, 65_536)
    assert model.linear_bytes + model.head_bytes == pytest.approx(15.01e9, rel=1e-3)
    assert rooflines["fp8"].model.linear_bytes + model.head_bytes == pytest.approx(8.03e9, rel=1e-3)
    assert [round(r.kv_tokens / 1e3) for r in rooflines.values()] == [480, 533, 1066]


@pytest.mark.parametrize("workload", THROUGHPUT, ids=lambda w: f"{w[0]}/{w[1]}")
def test_throughput_table(rooflines, workload):
    for roofline, (serial, overlap, batch) in zip(rooflines.values(), THROUGHPUT[workload]):
        assert round(roofline.serial(*workload)) == serial
        assert roofline.overlap(*workload) == pytest.approx(overlap, abs=1)
        assert abs(roofline.concurrency(*workload) - batch) <= 0.51


@pytest.mark.parametrize("name", STEPS_MS)
def test_step_table(rooflines, name):
    for batch, expected in STEPS_MS[name].items():
        step = 1e3 * rooflines[name].step(batch, 1024)
        assert float(f"{step:.3g}") == pytest.approx(expected, abs=0.0101)


@pytest.mark.parametrize(("name", "bandwidth"), FLOORS_MS)
def test_floor_of_batch_1(rooflines, name, bandwidth):
    roofline = replace(rooflines[name], hardware=replace(H100, bandwidth=bandwidth))
    assert 1e3 * roofline.step(1, 128) == pytest.approx(FLOORS_MS[name, bandwidth], abs=0.006)


def test_a_cap_of_1024_changes_nothing_where_arithmetic_binds(rooflines):
    for roofline in rooflines.values():
        assert roofline.serial(128, 128, 1024) == pytest.approx(roofline.serial(128, 128))
        assert roofline.serial(128, 128, 1) < 0.02 * roofline.serial(128, 128)


def test_one_request_alone_takes_its_steps(rooflines):
    roofline = rooflines["bf16"]
    seconds = 128 / roofline.serial(1, 128, 1)
    steps = sum(roofline.step(1, 1 + i) for i in range(128))
    assert seconds == pytest.approx(steps, rel=0.01)


def test_what_is_excluded_keeps_its_dtype(llama, rooflines):
    without_down = QuantConfig(quant_algo="FP8", exclude_modules=("*.down_proj",))
    model = ModelShape.of(replace(llama, quantization=without_down))
    down = 32 * 4096 * 14336
    assert model.linear_params - model.linear_fp8_params == down
    assert model.linear_bytes == rooflines["fp8"].model.linear_bytes + down
    assert model.weight_bytes == rooflines["fp8"].model.weight_bytes + down


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_every_dense_architecture_has_a_shape(tmp_path, architecture):
    for number, variant in enumerate(TINY[architecture].values()):
        directory = tmp_path / str(number)
        directory.mkdir()
        changes = {
            **variant,
            "architectures": [architecture],
            "model_type": architecture.removesuffix("ForCausalLM").lower(),
        }
        config = AutoConfig.from_hugging_face(write_config(directory, **changes), dtype="bfloat16")
        model = ModelShape.of(config)
        attention = 32 * config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        assert model.linear_params == 2 * (attention + 3 * 32 * 48)
        assert model.kv_bytes == 2 * 2 * config.num_key_value_heads * config.head_dim * 2
        assert Roofline(model, H100).serial(8, 8) > 0


def test_float32_and_unknown_schemes_are_refused(llama):
    with pytest.raises(ConfigError, match="float32"):
        ModelShape.of(replace(llama, dtype="float32"))
    with pytest.raises(ConfigError, match="W4A16"):
        ModelShape.of(replace(llama, quantization=QuantConfig(quant_algo="W4A16")))


def test_a_model_that_does_not_fit(llama):
    small = Hardware("small", 12 * 2**30, 1e12, 1e14, None)
    roofline = Roofline(ModelShape.of(llama), small)
    assert roofline.kv_tokens == 0
    with pytest.raises(ConfigError, match="does not fit"):
        roofline.serial(128, 128)


def brute_force(isl: int, osl: int, window: int) -> tuple[float, float]:
    """Pairs of a prompt within a window, and keys seen on average by the tokens after it."""
    pairs = sum(min(i + 1, window) for i in range(isl))
    seen = sum(min(isl + i, window) for i in range(osl)) / osl
    return pairs, seen


@pytest.mark.parametrize("window", [16, 300, 700, 1000])
def test_a_window_bounds_what_is_read(window):
    layer = LayerAttention(query_width=64, kv_bytes=1, window=window)
    model = ModelShape(0, 0, 0, 0, 0, 0, (layer,))
    hardware = Hardware("one", 1e12, 1.0, 1e30, None)
    pairs, seen = brute_force(400, 512, window)
    read_and_written = 512 / Roofline(model, hardware).serial(400, 512)
    assert read_and_written == pytest.approx(511 * seen + 912, rel=0.01)
    arithmetic = Roofline(model, replace(hardware, bandwidth=1e30, bf16_flops=1 / PREFILL_ATTENTION_EFFICIENCY))
    assert 512 / arithmetic.serial(400, 512) == pytest.approx(4 * 64 * pairs, rel=0.05)
    assert Roofline(model, hardware).step(2, 600) == pytest.approx(2 * min(600, window))


def test_the_command_prints_the_tables():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "roofline.py"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "| 128/128 | 22,452 (27,678) | 2498 | 35,313 (50,231) | 2775 | 41,471 (50,231) | 5550 |" in done.stdout
    assert "| fp8 weights and KV | 2.68 | 2.70 |" in done.stdout


@pytest.mark.parametrize(("changes", "message"), [(None, "no directory"), ({}, "float32")])
def test_a_model_without_a_roofline_is_one_line(tmp_path, changes, message):
    directory = "nosuch" if changes is None else write_config(tmp_path, **changes)
    command = [sys.executable, BENCHMARKS / "roofline.py", "--hf-config", directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("roofline.py: error: --hf-config: ") and message in done.stderr
