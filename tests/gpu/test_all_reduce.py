"""Sums and gathers over GPUs, one process each: every way, in CUDA graphs, and when a process is killed."""

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


@pytest.fixture(scope="module", params=WORLDS)
def results(request):
    """What each rank found, by task."""
    return run("everything", request.param)


@pytest.mark.parametrize("task", ["sums", "graphs"])
def test_sums_are_right_and_have_equal_bits(results, task):
    assert [rank[task]["wrong"] for rank in results] == [[]] * len(results)
    assert len({rank[task]["bits"] for rank in results}) == 1


def test_sum_fused_with_the_norm(results):
    assert all(rank["norms"]["totals_equal"] for rank in results)
    assert max(rank["norms"]["worst_steps"] for rank in results) <= 2.0
    assert len({rank["norms"]["bits"] for rank in results}) == 1


def test_gathers_along_any_dimension(results):
    assert [rank["gathers"] for rank in results] == [[]] * len(results)


@pytest.mark.parametrize("world", WORLDS)
def test_messages_down_the_pipeline_and_back(world):
    tp = world // 2
    got = run("messages", world, tp)
    assert got == [[20.0 + rank % tp, 51.0 - world] for rank in range(world)]


@two_gpus
@pytest.mark.parametrize("task", ["killed_in_kernel", "killed_in_gather", "killed_in_nccl", "killed_in_recorded_nccl"])
def test_killed_peer_does_not_hold_the_gpu(task):
    (waited_s, closing_s), none = run(task, 2)
    assert 0.5 < waited_s < 10.0 and closing_s < 3.0 and none is None


@two_gpus
def test_killed_stage_does_not_hold_the_gpu():
    (waited_s, closing_s), none = run("killed_in_links", 2, 1)
    assert 0.5 < waited_s < 10.0 and closing_s < 3.0 and none is None
