"""`lamella check` of directories that transformers cannot load as they are, or takes for others."""

from pathlib import Path

import pytest
from tests.core.checkpoint import test_float8_latents as float8
from tests.core.checkpoint import test_mxfp4 as mxfp4
from tests.llm.test_encode import write_tokenizer
from tests.support.tiny_models import hf_dir

from lamella.cli.check import run_check
from lamella_core.errors import ConfigError


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


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("GPT2LMHeadCustomModel", "one_kv_head"), "for a GPT2LMHeadModel, whose weights are others.*c_attn"),
        (("MPTForCausalLM", "grouped"), "cannot load .* nothing to compare with: .*attn_type"),
        (("InternLM2ForCausalLM", "grouped"), "cannot load .* nothing to compare with: .*internlm2"),
    ],
    ids=str,
)
def test_what_transformers_has_not_is_said(case: tuple[str, str], message: str):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        run_check(hf_dir(*case), text=None, max_tokens=4, dtype="float32", tolerance=1e-4, device="cpu")
