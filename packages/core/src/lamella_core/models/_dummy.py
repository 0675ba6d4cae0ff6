"""Dummy weights: random, finite, seeded, different per parameter, at memory speed."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from lamella_core.layers.parameter import set_parameter

SEED = 1234
BOUND = 1e-3  # values are uniform in [-BOUND, BOUND)
_POOL = (1 << 20) + 7  # random values drawn; odd, so that rows of a matrix do not repeat


def fill_dummy(model: nn.Module) -> None:
    """Gives every parameter fresh memory holding values from one random pool, entered at a place set by its name."""
    pools: dict[torch.dtype, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        if data.is_floating_point():
            if data.dtype not in pools:
                pools[data.dtype] = _pool(data.dtype)
            _tile(data.view(-1), pools[data.dtype], zlib.crc32(name.encode()) % _POOL)
        else:
            data.zero_()
        set_parameter(model, name, data)


def _pool(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.empty(_POOL, dtype=torch.float32).uniform_(-BOUND, BOUND, generator=generator).to(dtype)


def _tile(flat: torch.Tensor, pool: torch.Tensor, start: int) -> None:
    """Writes the pool into ``flat`` over and over, from pool element ``start`` on."""
    done = 0
    while done < flat.numel():
        count = min(flat.numel() - done, pool.numel() - start)
        flat[done : done + count] = pool[start : start + count]
        done, start = done + count, 0
