"""Kernels that sum and gather over ranks: two and three processes write into memory that they share."""

import fcntl
import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support import all_reduce_rank
from tests.support.warm_python import WarmPython

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.fp8 import quantize
from lamella_core.kernels.triton import all_gather

ROOT = Path(__file__).resolve().parents[3]
INTERPRETED = {"TRITON_INTERPRET": "1"}  # on GPUs too; read when triton is imported, and where kernels are launched


@pytest.fixture(scope="module")
def python():
    """Starts the ranks."""
    python = WarmPython("tests.support.all_reduce_rank", env=INTERPRETED)
    yield python
    python.close()


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    """By rank, what it computed; ending at all proves that the abort word ended rank 0's last calls.

    Computed once, also where the tests are divided among processes.
    """
    size, common = request.param, tmp_path_factory.getbasetemp()
    folder = (common.parent if "PYTEST_XDIST_WORKER" in os.environ else common) / f"all-reduce-{size}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            compute(request.getfixturevalue("python"), size, folder)
            (folder / "done").touch()
    return [load_file(folder / f"results{rank}") for rank in range(size)]


def compute(python, size, folder):
    code = "from tests.support.all_reduce_rank import main\nmain()"
    processes = [
        python.start(code, str(rank), str(size), str(folder), cwd=ROOT, env=INTERPRETED, stderr=2)
        for rank in range(size)
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def same_bits(a, b):
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def total(parts):
    """In rank order in float32, rounded once."""
    wide = parts[0].float()
    for part in parts[1:]:
        wide = wide + part.float()
    return wide.to(parts[0].dtype)


def test_all_ranks_have_equal_bits(results):
    for key, value in results[0].items():
        assert all(same_bits(value, other[key]) for other in results[1:]), key


@pytest.mark.parametrize("kernel", ["one", "two"])
def test_sums_are_exact_and_keep_apart(results, kernel):
    size = len(results)
    for name, words, round_ in itertools.product(
        all_reduce_rank.dtypes(size), all_reduce_rank.WORDS, range(all_reduce_rank.ROUNDS)
    ):
        parts = [all_reduce_rank.summand(rank, name, words, round_) for rank in range(size)]
        assert same_bits(results[0][f"{kernel} {name} {words} {round_}"], total(parts)), (name, words, round_)


def test_gathers_along_any_dimension(results):
    for name, shape in all_reduce_rank.GATHERED.items():
        for dim, round_ in itertools.product(range(len(shape)), range(all_reduce_rank.ROUNDS)):
            parts = [all_reduce_rank.part(rank, name, round_) for rank in range(len(results))]
            assert same_bits(results[0][f"gather {name} {dim} {round_}"], torch.cat(parts, dim)), (name, dim, round_)


def test_what_cannot_be_gathered():
    halves = torch.zeros(4, 3, dtype=torch.bfloat16)
    assert not all_gather.can_gather(halves, 1)  # a word and a half to a row
    assert all_gather.can_gather(halves, 0)
    assert not all_gather.can_gather(halves.view(-1)[1:3], 0)  # a word across two
    assert not all_gather.can_gather(torch.zeros(4, 4)[:, :2], 1)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm_of_the_sum(results, unit_offset):
    for name in all_reduce_rank.dtypes(len(results)):
        inputs = [all_reduce_rank.norm_inputs(rank, name) for rank in range(len(results))]
        _, residual, weight = inputs[0]
        x = total([rank[0] for rank in inputs])
        normed, stream = reference.rms_norm(x, weight, all_reduce_rank.EPS, residual, unit_offset)
        assert same_bits(results[0][f"total {name} {unit_offset}"], stream)
        step = torch.finfo(x.dtype).eps
        torch.testing.assert_close(results[0][f"normed {name} {unit_offset}"], normed, rtol=2 * step, atol=step)


def test_norm_as_float8(results):
    for name in set(all_reduce_rank.dtypes(len(results))) - {"float32"}:
        expected = quantize(results[0][f"normed {name} False"], torch.tensor(0.05)).float()
        assert torch.equal(results[0][f"float8 {name}"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90], ids=["no_float8_no_pdl", "hopper"])
def test_kernels_compile(compiler, capability, tmp_path):
    found = set(compiler.compile(capability, "tests.support.all_reduce_calls", tmp_path))
    assert found == {"_one_shot_kernel", "_two_shot_kernel", "_sum_norm_kernel", "_gather_kernel"}
