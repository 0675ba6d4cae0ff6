"""Slopes of ALiBi: transformers has them twice, written differently."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from lamella_core.layers.alibi import alibi_slopes


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 40, 71, 112])
def test_slopes_equal_transformers(heads):
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,) and slopes.dtype == torch.float32
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(slopes, bloom)
    torch.testing.assert_close(slopes, -build_mpt_alibi_tensor(heads, 2)[:, 0, 0])


@pytest.mark.parametrize("heads", [6, 8])
def test_bias_max_sets_the_least_slope(heads):
    slopes = alibi_slopes(heads, bias_max=4.0)
    torch.testing.assert_close(slopes, -build_mpt_alibi_tensor(heads, 2, 4)[:, 0, 0])
    assert slopes.min() == 2.0**-4
