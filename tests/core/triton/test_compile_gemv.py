"""The matmul kernels compile to machine code of the GPUs they are for, also where there is none."""

import pytest
from tests.support.triton_compiler import compile_in_subprocess


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["no_float8_no_pdl", "hopper"])
def test_matmul_kernels_compile(capability, tmp_path):
    names = set(compile_in_subprocess(capability, "tests.support.matmul_calls", tmp_path))
    assert names == {"vector_kernel", "matrix_kernel"}
