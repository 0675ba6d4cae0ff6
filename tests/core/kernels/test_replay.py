"""Recorded kernel calls: a replay computes what the recorded function computes, and nothing slips through."""

from __future__ import annotations

import gc

import pytest
import torch

from lamella_core.kernels.cpu import ops
from lamella_core.kernels.cpu.abi import RECORDABLE, SIGNATURES, kernels
from lamella_core.kernels.cpu.build import native_status
from lamella_core.kernels.cpu.replay import NotReplayableError, record

pytestmark = pytest.mark.skipif(not native_status().available, reason="no native kernels here")


def test_every_kernel_of_a_step_can_be_recorded():
    steps = {"lamella_team_size", "lamella_replay"}  # not part of a computation
    steps |= {"lamella_state_scan", "lamella_gated_delta_rule"}  # models with recurrent states run eagerly
    assert set(RECORDABLE) == set(SIGNATURES) - steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_computes_on_new_inputs(dtype):
    x, weight = torch.randn(3, 32).to(dtype), torch.randn(32).to(dtype)
    w = torch.randn(48, 32).to(dtype)
    panels, narrow = ops.pack_panels(w), weight[:24].contiguous()

    def compute() -> torch.Tensor:
        normed, total = ops.rms_norm(x, weight, 1e-5, residual=None)
        inner = ops.silu_and_mul(ops.matmul_panels(normed, panels, 48))
        return ops.rms_norm(ops.gemv_rows(total, w[:24]), narrow, 1e-3, residual=inner)[0]

    tape = record(compute)
    assert torch.equal(tape.output, compute())
    held = tape.output.clone()
    x.copy_(torch.randn(3, 32))
    gc.collect()
    [torch.full((3, 96), float("nan"), dtype=dtype) for _ in range(50)]  # would overwrite memory that was let go
    expected = compute()
    assert torch.equal(tape.replay(), expected) and not torch.equal(held, expected)


def test_arithmetic_of_pytorch_is_refused():
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(NotReplayableError, match=r"aten::(mul|add)"):
        record(lambda: ops.rms_norm(x * 2, weight, 1e-5)[0])
    with pytest.raises(NotReplayableError, match=r"aten::"):
        record(lambda: ops.rms_norm(x.to(torch.bfloat16), weight.bfloat16(), 1e-5)[0])


def test_recording_ends_when_the_function_raises():
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 // 0)
    assert hasattr(kernels(), "_handle")  # the library itself again


def test_a_failing_call_names_the_kernel():
    k = torch.randn(1, 1, 8)
    cache, slots = torch.zeros(2, 1, 4, 8), torch.tensor([3])

    def compute() -> torch.Tensor:
        ops.write_kv(k, k, cache, cache, slots)
        return cache

    tape = record(compute)
    slots.fill_(99)
    with pytest.raises(ValueError, match="write_kv"):
        tape.replay()
