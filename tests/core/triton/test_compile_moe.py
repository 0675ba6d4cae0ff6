"""Kernels of mixtures of experts compile to machine code of the GPUs they are for, also where there is none."""

import pytest

KERNELS = {
    "_count_kernel",
    "_place_kernel",
    "product_kernel",
    "sum_kernel",
    "_top_k_kernel",
    "quantize_kernel",
    "_quantize_per_token_kernel",
}
SORTED = {"spread_kernel", "sorted_product_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["no_float8_no_pdl", "hopper"])
def test_experts_compile(compiler, capability, tmp_path):
    compiled = set(compiler.compile(capability, "tests.support.moe_calls", tmp_path))
    assert compiled == (KERNELS | SORTED if capability >= 90 else KERNELS)
