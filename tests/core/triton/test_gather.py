"""Keys and values copied out of a paged cache, against taking them one by one."""

import pytest
import torch
from tests.support.paged_case import FLOAT8, PagedCase

from lamella_core.errors import ConfigError
from lamella_core.kernels.triton.attention.gather import gather_keys

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = (45, 1, 130, 32, 0, 7)
EDGE = 5  # rows before and after


def gathered(case: PagedCase, longest: int) -> tuple[torch.Tensor, ...]:
    """Returns the keys and values in order, [C, Hkv, D] each, after checking that nothing else was written."""
    q, k, v, tables, rows = case.tensors()
    count = sum(case.lengths)
    outs = torch.full((2, count + 2 * EDGE, case.kv_heads, case.dim), 7.0, dtype=case.dtype, device=case.device)
    gather_keys(
        tuple(outs[:, EDGE:]), q, k, v, tables, rows, case.context.to(case.device), max_context_len=longest
    )  # fmt: skip
    assert (outs[:, :EDGE] == 7.0).all() and (outs[:, EDGE + count :] == 7.0).all()
    return tuple(outs[:, EDGE : EDGE + count].cpu())


def check(case: PagedCase, longest: int | None = None) -> None:
    slots = torch.tensor(case.slots())
    for cache, ours in zip((case.k, case.v), gathered(case, longest or max(case.lengths)), strict=True):
        theirs = cache.float().transpose(1, 2).flatten(0, 1)[slots].to(case.dtype)  # [C, Hkv, D]
        assert not theirs.isnan().any() and torch.equal(ours, theirs)


@pytest.mark.parametrize(("dtype", "cache"), [(BF16, None), (FP16, None), (BF16, FLOAT8), (FP16, FLOAT8)], ids=str)
@pytest.mark.parametrize("page", [8, 32, 128])
def test_keys_and_values_lie_side_by_side(device, page, dtype, cache):
    check(PagedCase(LENGTHS, (0,) * len(LENGTHS), dtype, cache, heads=4, page=page, device=device))


@pytest.mark.parametrize("cache", [None, FLOAT8], ids=["own", "float8"])
@pytest.mark.parametrize(("dim", "kv_heads"), [(80, 2), (128, 1), (64, 3)])
def test_head_sizes(device, dim, kv_heads, cache):
    case = PagedCase((33, 70), (3, 9), BF16, cache, heads=2 * kv_heads, kv_heads=kv_heads, dim=dim, device=device)
    check(case)
    check(case, longest=500)  # a bound


def test_more_sequences_than_lengths_are_added_at_once(device):
    lengths = tuple(1 + i % 2 for i in range(150))
    check(PagedCase(lengths, lengths, BF16, heads=2, kv_heads=1, dim=16, page=8, device=device))


def test_a_cache_that_does_not_fit_is_refused(device):
    case = PagedCase((9,), (9,), BF16, heads=3, kv_heads=1, device=device)
    case.q = case.q.float()
    with pytest.raises(ConfigError, match="cached keys"):
        gathered(case, 9)
