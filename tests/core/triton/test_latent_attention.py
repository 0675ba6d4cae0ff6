"""Attention over a cache of latents, against the reference's: decoding, whole and in parts, and prompt chunks."""

import pytest
import torch
from tests.support.paged_case import FLOAT8, PagedCase

from lamella_core.errors import ConfigError
from lamella_core.kernels.triton.attention import mla

BASE = PagedCase(lengths=(64, 600), queries=(1, 1), heads=4, kv_heads=1, dim=48, value_dim=32)
CHUNKS = BASE.but(lengths=(5, 57, 70), queries=(5, 13, 1))
HALVES = (torch.bfloat16, torch.float16)
FLOAT8_BOUND = {torch.float32: None, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def inputs(case: PagedCase) -> tuple:
    q, k, _, tables, rows = case.tensors()
    return q, k, case.value_dim, tables, rows


def decode(case: PagedCase, **keywords) -> torch.Tensor:
    context = case.context.to(case.device)
    return mla.latent_decode(*inputs(case), context, max_context_len=1024, **case.keywords(), **keywords)


def prefill(case: PagedCase, **keywords) -> torch.Tensor:
    starts, context = case.starts.to(case.device), case.context.to(case.device)
    longest = max(case.queries, default=0)
    return mla.latent_prefill(*inputs(case), starts, context, max_query_len=longest, **case.keywords(), **keywords)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("cache", [None, FLOAT8], ids=["own", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_decoding(device, dtype, cache, parts):
    scales = None if cache is None else (0.5, 0.5)
    case = BASE.but(device=device, dtype=dtype, cache=cache, kv_scales=scales)
    case.check(decode(case, parts=parts), None if cache is None else FLOAT8_BOUND[dtype])


@pytest.mark.parametrize("cache", [None, FLOAT8], ids=["own", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_prompts(device, dtype, cache):
    scales = None if cache is None else (0.5, 0.5)
    case = CHUNKS.but(device=device, dtype=dtype, cache=cache, kv_scales=scales)
    case.check(prefill(case), None if cache is None else FLOAT8_BOUND[dtype])


@pytest.mark.parametrize("heads, dim, value_dim", [(1, 20, 12), (20, 28, 20), (128, 96, 64), (16, 576, 512)])
def test_shapes(device, heads, dim, value_dim):
    case = BASE.but(device=device, dtype=torch.bfloat16, heads=heads, dim=dim, value_dim=value_dim)
    one = case.but(lengths=(530,), queries=(1,))
    one.check(decode(one, parts=2))
    chunks = case.but(lengths=(3, 40), queries=(3, 2))
    chunks.check(prefill(chunks))


@pytest.mark.parametrize("window, sinks", [(37, 0), (37, 5), (1, 0), (300, 20)])
def test_windows(device, window, sinks):
    options = {"sliding_window": window, "num_sinks": sinks}
    case = BASE.but(device=device, options=options, page=8)
    case.check(decode(case, parts=2))
    chunks = CHUNKS.but(device=device, options=options, page=8)
    chunks.check(prefill(chunks))


def test_parts_come_by_themselves_and_their_memory_serves_again(device):
    case = BASE.but(device=device, lengths=(600, 1000, 3), queries=(1, 1, 1))
    space = mla.latent_workspace(case.heads, case.value_dim, device)
    assert mla.choose_parts(1, 1024, 4) == 4 and mla.choose_parts(1, 300, 4) == 1 and mla.choose_parts(8, 9999, 4) == 1
    first = decode(case, workspace=space)
    case.check(first)
    space.partial.fill_(float("nan")), space.stats.fill_(float("nan"))
    assert torch.equal(decode(case, workspace=space), first)
    single = case.but(lengths=(1000,), queries=(1,))
    single.check(decode(single, workspace=space, parts=4))


def test_rows_without_keys_are_zero(device):
    case = BASE.but(device=device)
    case.context[0] = 0
    result = decode(case, parts=2)
    assert not result[0].any() and result[1].any()


def test_nothing_to_do(device):
    case = BASE.but(device=device, lengths=(), queries=())
    assert decode(case).shape == prefill(case).shape == (0, case.heads, case.value_dim)


def test_what_does_not_fit_is_refused(device):
    case = BASE.but(device=device)
    with pytest.raises(ConfigError, match="one head"):
        decode(case.but(kv_heads=2))
    with pytest.raises(ConfigError, match="values narrower"):
        decode(case.but(value_dim=48))
    with pytest.raises(ConfigError, match="out is"):
        decode(case, out=torch.empty(2, 4, 48, device=device))
    with pytest.raises(ConfigError, match="workspace is too small"):
        small = mla.Workspace(torch.empty(1, 16, 8), torch.empty(1, 2, 16))
        decode(case, parts=2, workspace=small)
