"""`lamella check` of directories that transformers cannot load as they are, or takes for others."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.core.checkpoint import test_float8_latents as float8
from tests.core.checkpoint import test_mxfp4 as mxfp4
from tests.llm.test_encode import write_tokenizer
from tests.support.tiny_models import TINY, hf_dir, hf_model

from lamella.cli.check import run_check
from lamella.cli.oracles import OwnModel
from lamella_core.errors import CheckpointError
from lamella_core.quantization.config import QuantConfig


@pytest.mark.parametrize("kind", ["scales_per_block", "mxfp4"])
def test_check_compares_what_narrow_weights_stand_for(kind: str, tmp_path: Path):
    if kind == "mxfp4":
        (tmp_path / "packed").mkdir()
        (tmp_path / "wide").mkdir()
        directory = mxfp4.write(tmp_path / "packed", tmp_path / "wide")[0]
    else:
        directory = float8.write(tmp_path, ("DeepseekV3ForCausalLM", "yarn_groups"), "block")[0]
    write_tokenizer(directory, is_pair=False)
    options = {"text": "w5 w6 w7", "max_tokens": 4, "dtype": "float32", "device": "cpu"}
    assert run_check(directory, tolerance=1e-4, **options)
    assert not run_check(directory, tolerance=0.0, **options)


OWN = [
    (("BaichuanForCausalLM", "alibi"), "transformers has no class for BaichuanForCausalLM"),
    (("ChatGLMModel", "grouped"), "no class for ChatGLMModel"),
    (("ChatGLM1Model", "chat"), "no class for ChatGLM1Model"),
    (("DeciLMForCausalLM", "left_out"), "no class for DeciLMForCausalLM"),
    (("GLMModel", "last_blank"), "no class for GLMModel"),
    (("GPT2LMHeadCustomModel", "one_kv_head"), "for a GPT2LMHeadModel, whose weights are others .*c_attn"),
    (("InternLMForCausalLM", "biased"), "no class for InternLMForCausalLM"),
    (("InternLM2ForCausalLM", "grouped"), "no class for InternLM2ForCausalLM"),
    (("MPTForCausalLM", "grouped"), "no class for MPTForCausalLM"),
    (("Phi3SmallForCausalLM", "sparse_first"), "no class for Phi3SmallForCausalLM"),
    (("QWenLMHeadModel", "short"), "no class for QWenLMHeadModel"),
    (("RWForCausalLM", "refined_web"), "no class for RWForCausalLM"),
]
OPTIONS = {"text": "w5 w6 w7 w8", "max_tokens": 4, "dtype": "float32", "device": "cpu", "tolerance": 1e-4}


def copied(case: tuple[str, str], to: Path) -> Path:
    """Returns the directory of a tiny model with a tokenizer."""
    directory = shutil.copytree(hf_dir(*case), to / "model")
    write_tokenizer(directory, is_pair=False)
    return directory


@pytest.mark.parametrize(("case", "reason"), OWN, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_what_transformers_has_not_is_compared_with_the_own_computation(
    case: tuple[str, str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    directory = copied(case, tmp_path)
    assert run_check(directory, **OPTIONS)
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(f"{reason}.*; compared with Lamella's own float32 computation, .* not of the model", out)
    assert "tensors of the" in out and "read, of the shapes" in out


def test_rounding_fails_the_comparison_with_the_own_computation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = copied(("InternLM2ForCausalLM", "grouped"), tmp_path)
    assert not run_check(directory, **{**OPTIONS, "dtype": "bfloat16"})
    quantized = {**OPTIONS, "quant_config": QuantConfig("FP8_PER_CHANNEL_PER_TOKEN", "FP8")}
    run_check(directory, **quantized)
    out = capsys.readouterr().out
    assert "FAILED" in out and "Lamella in float32" in out and "FP8_PER_CHANNEL_PER_TOKEN" in out


def test_weights_that_do_not_fit_are_named(tmp_path: Path):
    directory = copied(("InternLM2ForCausalLM", "grouped"), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["another.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)missing:\s+model.norm.weight.*unexpected:\s+another.weight"):
        run_check(directory, **OPTIONS)


def test_the_class_that_config_json_names_is_taken_where_transformers_chooses_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_check(copied(("MllamaForCausalLM", "one_skipped"), tmp_path), **OPTIONS)
    assert "compared with transformers' MllamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize("case", [
    ("Gemma2ForCausalLM", "low_caps"), ("Llama4ForCausalLM", "chunks_and_unrotated"), ("GptOssForCausalLM", None),
    ("DeepseekV2ForCausalLM", None), ("Mamba2ForCausalLM", None), ("BloomForCausalLM", None),
    ("FalconForCausalLM", "sequential_alibi"),
], ids=lambda case: case[0])  # fmt: skip
def test_the_own_computation_is_that_of_transformers(case: tuple[str, str | None]):
    """Soft-caps, chunks, sinks, latents, states and ALiBi, where both oracles can be had."""
    variant = case[1] or next(iter(TINY[case[0]]))
    ids = torch.randint(3, 131, (23,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = hf_model(case[0], variant)(torch.tensor([ids])).logits[0]
        own = OwnModel.load(hf_dir(case[0], variant), "none")
        assert (own.logits(ids, len(ids)) - expected).abs().max() < 3e-5
