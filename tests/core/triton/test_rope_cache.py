"""Rotation and the cache write in one kernel, against the reference's two steps."""

import pytest
import torch

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.triton.rope_cache import rope_and_cache

BLOCK = 16


class Step:
    """Queries, keys and values as views of one fused projection, two caches of five blocks, and slots."""

    def __init__(self, device, tokens=7, q_heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16, cache=None):
        generator = torch.Generator().manual_seed(5)
        fused = torch.randn(tokens, (q_heads + 2 * kv_heads) * dim, generator=generator).to(dtype).to(device)
        self.q, self.k, self.v = (
            part.unflatten(1, (-1, dim)) for part in fused.split([q_heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        shape = (5, kv_heads, BLOCK, dim)
        self.k_cache, self.v_cache = (torch.full(shape, fill, device=device).to(cache or dtype) for fill in (7.0, -7.0))
        self.slots = torch.randperm(5 * BLOCK, generator=generator)[:tokens].to(device)
        self.angles = torch.rand(tokens, dim, generator=generator).to(device) * 300

    def tables(self, rotary):
        return self.angles[:, : rotary // 2].cos().contiguous(), self.angles[:, : rotary // 2].sin().contiguous()

    def expected(self, rotary, interleaved, scales=None):
        """Rotated queries and the two caches."""
        q, k = self.q.clone(), self.k.clone()
        if rotary:
            reference.rope_inplace(q, k, *self.tables(rotary), rotary, interleaved)
        caches = [self.k_cache.clone(), self.v_cache.clone()]
        for i, x in enumerate((k, self.v)):
            if caches[i].dtype == torch.float8_e4m3fn:
                x = (x.float() / (1.0 if scales is None else scales[i])).clamp(-448, 448).to(torch.float8_e4m3fn)
            raw = torch.uint8 if caches[i].dtype == torch.float8_e4m3fn else caches[i].dtype
            for token, slot in enumerate(self.slots.tolist()):
                if slot >= 0:
                    caches[i].view(raw)[slot // BLOCK, :, slot % BLOCK] = x.view(raw)[token]
        return q, *caches

    def check(self, rotary, interleaved, scales=None, rotate_keys=False):
        q, k_cache, v_cache = self.expected(rotary, interleaved, scales)
        keys = self.k.clone()
        if rotate_keys:
            reference.rope_inplace(self.q.clone(), keys, *self.tables(rotary), rotary, interleaved)
        cos, sin = self.tables(rotary) if rotary else (None, None)
        rope_and_cache(
            self.q, self.k, self.v, cos, sin, rotary, interleaved, self.k_cache, self.v_cache, self.slots, scales,
            rotate_keys,
        )  # fmt: skip
        for ours, theirs in ((self.q, q), (self.k_cache, k_cache), (self.k, keys)):
            step = 2**-3 if ours.dtype == torch.float8_e4m3fn else 2 * torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=step, atol=1e-6)
            differs = (ours.float() != theirs.float()).sum()
            assert ours.dtype == torch.float32 or differs <= 0.005 * ours.numel()
        assert torch.equal(self.v_cache.float(), v_cache.float())
        assert rotate_keys or torch.equal(self.k, keys)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    ("dim", "rotary"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (128, 64), (80, 32), (256, 64), (64, 24)]
)
def test_head_sizes(device, dim, rotary, interleaved):
    Step(device, dim=dim).check(rotary, interleaved)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (12, 12), (71, 1), (3, 1), (24, 3)])
def test_head_counts(device, q_heads, kv_heads):
    Step(device, tokens=3, q_heads=q_heads, kv_heads=kv_heads).check(64, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dtypes(device, dtype):
    Step(device, dtype=dtype).check(64, False)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("scales", [None, (0.31, 0.002)], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("rotary", [0, 40, 80])
def test_float8_cache(device, rotary, scales, interleaved):
    """The second scale makes values saturate."""
    scales = None if scales is None else torch.tensor(scales, device=device)
    Step(device, dim=80, cache=torch.float8_e4m3fn).check(rotary, interleaved, scales)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary", [40, 80])
def test_keys_in_place(device, rotary, interleaved):
    scales = torch.tensor((0.31, 0.02), device=device)
    Step(device, dim=80, cache=torch.float8_e4m3fn).check(rotary, interleaved, scales, rotate_keys=True)


def test_without_rotation_queries_stay(device):
    step = Step(device)
    before = step.q.clone()
    step.check(0, False)
    assert torch.equal(step.q, before)


def test_negative_slots_are_rotated_but_not_written(device):
    step = Step(device, tokens=5)
    step.slots[1] = step.slots[4] = -1
    step.check(64, False)


def test_one_token_and_none(device):
    Step(device, tokens=1).check(64, False)
    step = Step(device, tokens=0)
    step.check(64, False)
    assert (step.k_cache == 7).all()


def test_cache_inside_a_larger_tensor(device):
    """Keys and values of a block side by side, as some attention kernels want them."""
    step = Step(device)
    both = torch.stack([step.k_cache, step.v_cache], dim=1)
    step.k_cache, step.v_cache = both[:, 0], both[:, 1]
    step.check(64, False)


def test_latent_keys_have_no_values(device):
    step = Step(device, kv_heads=1, dim=72, q_heads=4)
    q, k_cache, _ = step.expected(16, True)
    rope_and_cache(step.q, step.k, None, *step.tables(16), 16, True, step.k_cache, step.k_cache[..., 8:], step.slots)
    step_size = 2 * torch.finfo(torch.bfloat16).eps
    for ours, theirs in ((step.q, q), (step.k_cache, k_cache)):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=step_size, atol=1e-6)
