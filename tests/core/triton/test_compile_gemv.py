"""The matmul kernels compile to machine code of the GPUs they are for, also where there is none."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["no_float8_no_pdl", "hopper"])
def test_matmul_kernels_compile(compiler, capability, tmp_path):
    names = set(compiler.compile(capability, "tests.support.matmul_calls", tmp_path))
    assert names == {"vector_kernel", "matrix_kernel"}
