"""Glue and attention kernels compile to machine code of the GPUs they are for, also where there is none."""

import pytest

KERNELS = {
    "_rms_norm_kernel",
    "_silu_and_mul_kernel",
    "_quantize_kernel",
    "_quantize_per_token_kernel",
    "_rope_cache_kernel",
    "_argmax_kernel",
    "_greedy_kernel",
    "histogram_kernel",
    "thresholds_kernel",
    "masses_kernel",
    "draw_kernel",
}
STATE_SPACE = {"_conv_kernel", "_scan_kernel", "_chunk_scan_kernel", "_delta_rule_kernel"}
ATTENTION = {"_decode_kernel", "_prefill_kernel", "_latent_kernel", "_join_kernel", "_gather_keys_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["no_float8_no_pdl", "hopper"])
def test_glue_compiles(compiler, capability, tmp_path):
    assert set(compiler.compile(capability, "tests.support.glue_calls", tmp_path)) == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["no_float8_no_pdl", "hopper"])
def test_attention_compiles(compiler, capability, tmp_path):
    assert set(compiler.compile(capability, "tests.support.attention_calls", tmp_path)) == ATTENTION


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["no_pdl", "hopper"])
def test_state_space_compiles(compiler, capability, tmp_path):
    assert set(compiler.compile(capability, "tests.support.state_space_calls", tmp_path)) == STATE_SPACE
