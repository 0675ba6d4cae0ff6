"""Sums over GPUs, one process each: every way, in CUDA graphs, and when a process is killed."""

import pytest
import torch
from tests.support.rank_launch import answers

WORLDS = [
    pytest.param(size, marks=pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} GPUs"))
    for size in (2, 4)
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


def run(task, world, tp=None):
    return answers(task, world, tp or world, module="gpu_rank_process", timeout_s=240.0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("task", ["sums", "graphs"])
def test_sums_are_right_and_have_equal_bits(task, world):
    got = run(task, world)
    assert [answer["wrong"] for answer in got] == [[]] * world
    assert len({answer["bits"] for answer in got}) == 1


@pytest.mark.parametrize("world", WORLDS)
def test_sum_fused_with_the_norm(world):
    got = run("norms", world)
    assert all(answer["totals_equal"] for answer in got)
    assert max(answer["worst_steps"] for answer in got) <= 2.0
    assert len({answer["bits"] for answer in got}) == 1


@two_gpus
def test_gathers_along_any_dimension():
    assert run("gathers", 2) == [[True] * 6] * 2


@pytest.mark.parametrize("world", WORLDS)
def test_messages_down_the_pipeline_and_back(world):
    tp = world // 2
    got = run("messages", world, tp)
    assert got == [[20.0 + rank % tp, 51.0 - world] for rank in range(world)]


@two_gpus
@pytest.mark.parametrize("task", ["killed_in_kernel", "killed_in_nccl"])
def test_killed_peer_does_not_hold_the_gpu(task):
    (waited_s,), none = run(task, 2)
    assert 0.5 < waited_s < 10.0 and none is None
