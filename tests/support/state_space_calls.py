"""Calls that compile the kernels of layers with states: see `tests.support.triton_compiler`."""

from __future__ import annotations

import torch

from lamella_core.context import RecurrentStep
from lamella_core.kernels.cpu.delta_rule import DecayParameters
from lamella_core.kernels.cpu.state_space import ScanParameters
from lamella_core.kernels.triton import delta_rule, state_space

SLOTS = 4


def _step() -> RecurrentStep:
    """One sequence that decodes and one of 100 tokens."""
    slots, is_first = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([False, True])
    return RecurrentStep((), slots, is_first, torch.tensor([0, 100], dtype=torch.int32), 1, 100)


def calls() -> None:
    """Mamba-2.8B's, Nemotron-H's and Qwen3-Next's layers, in bfloat16; small ones (quicker to compile) in float32."""
    step, tokens = _step(), 101
    for dtype, heads, size, groups, state in (
        (torch.bfloat16, 5120, 1, 1, 16),
        (torch.bfloat16, 128, 64, 8, 128),
        (torch.float32, 8, 16, 1, 16),
    ):
        channels = heads * size
        x = torch.zeros(tokens, channels, dtype=dtype)
        windows = torch.zeros(SLOTS + 1, channels, 3, dtype=dtype)
        state_space.causal_conv1d(x, torch.zeros(channels, 4, dtype=dtype), x[0], windows, step)
        a_log = torch.zeros(heads, state) if size == 1 else torch.zeros(heads)
        params = ScanParameters(a_log, torch.zeros(heads), torch.zeros(heads), 0.0, 4.0 if size == 1 else None)
        b = torch.zeros(tokens, groups, state, dtype=dtype)
        states = torch.zeros(SLOTS + 1, heads, size, state)
        state_space.selective_scan(x.unflatten(1, (heads, size)), x[:, :heads], b, b, params, states, step)
    for dtype, key_heads, heads, size in ((torch.bfloat16, 16, 32, 128), (torch.float32, 2, 4, 64)):
        params, states = DecayParameters(torch.zeros(heads), torch.zeros(heads)), torch.zeros(SLOTS, heads, size, size)
        qkv = torch.zeros(tokens, (2 * key_heads + heads) * size, dtype=dtype)
        delta_rule.gated_delta_rule(qkv, qkv[:, :heads], qkv[:, heads : 2 * heads], params, states, step)
