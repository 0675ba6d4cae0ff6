"""Softmax and top-k of experts' scores against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lamella_core.kernels import ops
from lamella_core.kernels.triton.routing import top_k_softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (60, 7), (128, 8), (5, 5)])
def test_as_torch_does(experts: int, top_k: int, renormalize: bool, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(experts)
    scores = torch.stack([torch.randperm(experts, generator=generator) for _ in range(9)]).to(dtype) / 8
    places, values = top_k_softmax(scores.to(device), top_k, renormalize)
    expected_places, expected = ops.top_k_softmax(scores, top_k, renormalize)
    assert places.dtype == torch.int64 and values.dtype == torch.float32
    assert torch.equal(places.cpu(), expected_places)
    torch.testing.assert_close(values.cpu(), expected, rtol=2e-6, atol=1e-7)


def test_rows_of_a_wider_tensor_and_equal_scores(device: str) -> None:
    wide = torch.zeros(3, 12)
    wide[:, 6] = 1.0
    places, values = top_k_softmax(wide.to(device)[:, 4:10], 3, True)
    assert places.cpu().tolist() == [[2, 0, 1]] * 3
    torch.testing.assert_close(values.sum(-1).cpu(), torch.ones(3))


def test_no_number_is_no_place_outside(device: str) -> None:
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    scores[0, 3] = torch.nan
    places, values = top_k_softmax(scores.to(device), 2, False)
    assert ((places >= 0) & (places < 6)).all() and values[0].isnan().all()
    assert torch.equal(places[1].cpu(), scores[1].topk(2).indices)


def test_no_tokens(device: str) -> None:
    places, values = top_k_softmax(torch.empty(0, 8, device=device), 2, True)
    assert places.shape == values.shape == (0, 2)
