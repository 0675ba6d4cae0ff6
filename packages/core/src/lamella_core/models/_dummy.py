"""Dummy weights: random, finite, seeded, different per parameter, at memory speed.

Float8 weights use their whole range and scales that bring them to that of the others. The scales of activations and of
the KV cache are of the magnitudes that such a model has: neither zeros nor saturated values are multiplied, which would
take another time.
"""

from __future__ import annotations

import fnmatch
import zlib

import torch
from torch import nn

from lamella_core.kernels.fp8 import FLOAT8, FLOAT8_MAX
from lamella_core.layers.parameter import set_parameter

SEED = 1234
BOUND = 1e-3  # values are uniform in [-BOUND, BOUND)
_SCALES = (  # name pattern -> value
    ("*.weight_scale", BOUND / FLOAT8_MAX),
    ("*.down_proj.activation_scale", 1e-11),  # products of two small numbers come in
    ("*.activation_scale", 1e-5),
    ("*.kv_scales", 1e-6),
)
_POOL = (1 << 20) + 7  # random values drawn; odd, so that rows of a matrix do not repeat


def fill_dummy(model: nn.Module, device: str = "cpu") -> None:
    """Gives every parameter fresh memory holding values from one random pool, entered at a place set by its name.

    The values are the same on every device.
    """
    pools: dict[torch.dtype, torch.Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        scale = next((value for pattern, value in _SCALES if fnmatch.fnmatchcase(name, pattern)), None)
        if scale is not None:
            data.fill_(scale)
        elif data.is_floating_point():
            if data.dtype not in pools:
                pools[data.dtype] = _pool(data.dtype).to(device)
            _tile(data.view(-1), pools[data.dtype], zlib.crc32(name.encode()) % _POOL)
        else:
            data.zero_()
        set_parameter(model, name, data)


def _pool(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    bound = FLOAT8_MAX if dtype == FLOAT8 else BOUND
    return torch.empty(_POOL, dtype=torch.float32).uniform_(-bound, bound, generator=generator).to(dtype)


def _tile(flat: torch.Tensor, pool: torch.Tensor, start: int) -> None:
    """Writes the pool into ``flat`` over and over, from pool element ``start`` on."""
    done = 0
    while done < flat.numel():
        count = min(flat.numel() - done, pool.numel() - start)
        flat[done : done + count] = pool[start : start + count]
        done, start = done + count, 0
