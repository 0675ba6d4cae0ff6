"""How a runner starts: what its errors and its log say."""

from __future__ import annotations

import pytest
import torch
from tests.support.device_steps import runner_setup

from lamella_core.errors import OutOfMemoryError
from lamella_executor.runner.cuda import start
from lamella_executor.runner.cuda.runner import CudaRunner

MIB = 1 << 20
NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
)
PLACES = {
    "choose_parts": "the memory that attention works in found no memory.*lower max_num_tokens or max_batch_size",
    "_measure": "the first step, of 32 tokens and 6 sequences at most, found no memory.*lower max_num_tokens",
    "_make_runner": "the KV cache, as planned above, found no memory.*lower KvCacheConfig.free_gpu_memory_fraction",
    "capture": "recording decoding steps found no memory.*lower KvCacheConfig.free_gpu_memory_fraction",
}


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3 * MIB, 80 * MIB))


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_finds_no_memory_says_numbers_and_knobs(place, error, little_memory, monkeypatch):
    monkeypatch.setattr(CudaRunner if place == "capture" else start, place, failing(error))
    with pytest.raises(OutOfMemoryError, match=PLACES[place]) as caught:
        start.start_runner(runner_setup(), "torch", "cpu")
    assert ": 3 of 80 MiB are free (" in str(caught.value) and caught.value.__cause__ is error


def test_other_errors_stay_what_they_are(monkeypatch):
    error = RuntimeError("an illegal memory access was encountered")
    monkeypatch.setattr(start, "_measure", failing(error))
    with pytest.raises(RuntimeError) as caught:
        start.start_runner(runner_setup(), "torch", "cpu")
    assert caught.value is error
