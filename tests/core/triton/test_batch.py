"""From packed integers to a step's inputs, and updates of block tables and sampling parameters."""

from __future__ import annotations

import struct

import pytest
import torch

from lamella_core.kernels.triton.batch import RECORD_INTS, apply_updates, prepare_step

P = 4


def int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("count", [1, 5, 300])
def test_prepared_inputs(device, count):
    generator = torch.Generator().manual_seed(count)
    tables = torch.randperm(7 * 50, generator=generator).int().view(7, 50)
    slots = torch.randint(0, 7, (count,), generator=generator)
    positions = torch.randint(0, 50 * P, (count,), generator=generator)
    tokens = torch.randint(0, 1000, (count,), generator=generator)
    outputs = tuple(torch.full((count + 3,), -7, dtype=torch.int64, device=device) for _ in range(3))
    prepare_step(
        tokens.int().to(device), slots.int().to(device), positions.int().to(device),
        torch.zeros(4, dtype=torch.int32, device=device), tables.to(device), P, outputs,
    )  # fmt: skip
    places = tables[slots, positions // P].long() * P + positions % P
    for made, expected in zip(outputs, (tokens, positions, places), strict=True):
        assert torch.equal(made[:count].cpu(), expected)
        assert (made[count:] == -7).all()


def test_pending_tokens_come_from_the_step_before(device):
    outputs = tuple(torch.zeros(4, dtype=torch.int64, device=device) for _ in range(3))
    sampled = int32([70, -2, 90], device)
    zeros, tables = int32([0, 0, 0, 0], device), int32([[0]], device)
    prepare_step(int32([5, -1, -3, -2], device), zeros, zeros, sampled, tables, P, outputs)
    assert outputs[0].tolist() == [5, 70, 90, 0]  # -2 is an error's code: any token will do, as nobody reads on


def test_places_beyond_32_bits(device):
    block = (1 << 31) // P + 5
    outputs = tuple(torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3))
    zeros = int32([0], device)
    prepare_step(zeros, zeros, int32([3], device), zeros, int32([[block]], device), P, outputs)
    assert outputs[2].tolist() == [block * P + 3]


def record(slot: int, top_k: int, temperature: float, top_p: float, min_p: float, seed: int) -> list[int]:
    raw = struct.pack("<3d", temperature, top_p, min_p) + seed.to_bytes(16, "little")
    return [slot, top_k, *struct.unpack("<10i", raw)]


@pytest.mark.parametrize("num_entries", [0, 3, 400])
def test_updates(device, num_entries):
    tables = torch.zeros(9, 60, dtype=torch.int32, device=device)
    dtypes = (torch.float64, torch.int32, torch.float64, torch.float64, torch.int64, torch.int64)
    parameters = tuple(torch.zeros(9, dtype=dtype, device=device) for dtype in dtypes)
    seed = (0xFEDC_BA98_7654_3210 << 64) | 0x8000_0001_FFFF_FFFF
    records = [record(8, 0, 0.0, 1.0, 0.0, 0), record(3, 50, 0.7, 0.9, 0.05, seed)]
    places = torch.randperm(9 * 60, generator=torch.Generator().manual_seed(0))[:num_entries]
    blocks = torch.arange(1, num_entries + 1)
    apply_updates(
        int32(records, device).view(-1, RECORD_INTS), places.int().to(device), blocks.int().to(device), tables,
        parameters,
    )  # fmt: skip
    expected = torch.zeros(9 * 60, dtype=torch.int32)
    expected[places] = blocks.int()
    assert torch.equal(tables.view(-1).cpu(), expected)
    temperature, top_k, top_p, min_p, low, high = (values.cpu() for values in parameters)
    assert (temperature[3], top_k[3], top_p[3], min_p[3]) == (0.7, 50, 0.9, 0.05)
    assert (int(low[3]) % (1 << 64), int(high[3]) % (1 << 64)) == (seed % (1 << 64), seed >> 64)
    assert (temperature[8], top_p[8], int(low[8])) == (0.0, 1.0, 0)
    assert not top_p[[0, 1, 2, 4, 5, 6, 7]].any()
