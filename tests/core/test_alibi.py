"""ALiBi: slopes, which transformers has twice, written differently, and Falcon's rounding."""

from __future__ import annotations

import pytest
import torch
from tests.support.executors import prompt
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.tiny_models import hf_dir, hf_model
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as build_falcon_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from lamella_core.kernels.cpu.reference import alibi_bias
from lamella_core.layers.alibi import alibi_slopes
from lamella_core.models.registry import get_model_class


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


@pytest.mark.parametrize("heads", [1, 12, 32, 64, 71])
def test_rounded_bias_equals_transformers(heads):
    slopes, keys = alibi_slopes(heads).bfloat16().float(), torch.arange(3000)
    bias = alibi_bias(slopes, keys[-1:], keys, 1.0)
    assert torch.equal(bias, build_falcon_alibi_tensor(torch.ones(1, 3000).long(), heads, torch.float32))


@pytest.mark.parametrize("variant", ["sequential_alibi", "one_kv_head_alibi"])
def test_falcon_equals_transformers_beyond_what_bfloat16_counts(variant):
    case, ids = ("FalconForCausalLM", variant), prompt(300)
    model = get_model_class(case[0]).from_hugging_face(hf_dir(*case))
    logits = forward_step(model, ReferenceCache(), {"it": ids})["it"]
    with torch.no_grad():
        expected = hf_model(*case)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
