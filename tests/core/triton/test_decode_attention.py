"""Attention of one query per sequence, against the reference's."""

import pytest
import torch
from tests.support.paged_case import FLOAT8, OPTIONS, PagedCase, every_option

from lamella_core.errors import ConfigError
from lamella_core.kernels.triton.attention.decode import decode_attention
from lamella_core.kernels.triton.attention.decode_plan import (
    MOST_PROGRAMS_PER_PROCESSOR,
    Split,
    Tile,
    choose_split,
    decode_workspace,
)

LENGTHS = (64, 200)  # one whole, one in parts
BASE = PagedCase(lengths=LENGTHS, queries=(1,) * len(LENGTHS))
PARTS = Split(3, 32)
HALVES = (torch.bfloat16, torch.float16)


def run(case: PagedCase, **keywords) -> torch.Tensor:
    return decode_attention(
        *case.tensors(), case.context.to(case.device), max_context_len=256, **case.keywords(), **keywords
    )


@pytest.mark.parametrize("split", [Split(1, 4096), PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_it_is_the_reference(device, dtype, split):
    case = BASE.but(device=device, dtype=dtype)
    case.check(run(case, split=split))


@pytest.mark.parametrize("split", [Split(1, 4096), PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_float8_cache(device, dtype, split):
    case = BASE.but(device=device, dtype=dtype, cache=FLOAT8, kv_scales=(0.5, 2.0))
    case.check(run(case, split=split), None if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("cache", [None, FLOAT8], ids=["own", "float8"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_sizes(device, dim, cache):
    case = BASE.but(device=device, dtype=torch.bfloat16, cache=cache, dim=dim, lengths=(40, 200), queries=(1, 1))
    case.check(run(case, split=PARTS))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (71, 1)])
def test_groups(device, heads, kv_heads):
    case = BASE.but(device=device, heads=heads, kv_heads=kv_heads, lengths=(40, 200), queries=(1, 1))
    case.check(run(case, split=PARTS))
    case.check(run(case))


@pytest.mark.parametrize("page", [8, 64, 128])
@pytest.mark.parametrize("tile", [Tile(16, 1, 3), Tile(64, 4, 3)], ids=["small", "large"])
def test_blocks_and_tiles(device, page, tile):
    case = BASE.but(device=device, page=page, dtype=torch.bfloat16)
    case.check(run(case, tile=tile))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(device, name):
    case = BASE.but(device=device, options=OPTIONS[name])
    case.check(run(case, split=PARTS))


def test_rounded_alibi_beyond_what_bfloat16_counts(device):
    case = BASE.but(device=device, lengths=(300, 521), queries=(1, 1), options=OPTIONS["rounded alibi"])
    case.check(run(case, split=PARTS))
    case = case.but(cache=FLOAT8, kv_scales=(0.5, 2.0))
    case.check(run(case, split=PARTS))


def test_all_at_once_in_float8(device):
    case = BASE.but(device=device, dtype=torch.bfloat16, cache=FLOAT8, kv_scales=(2.0, 0.5), options=every_option(8))
    case.check(run(case, split=PARTS))


def test_float8_result(device):
    case = BASE.but(device=device)
    scale = torch.tensor(0.02, device=device)
    for split in (None, PARTS):
        result = run(case, out_scale=scale, split=split)
        assert result.dtype == FLOAT8
        torch.testing.assert_close(result.float().cpu() * 0.02, case.expected(), rtol=0.07, atol=1e-4)


def test_no_keys_and_no_sequences(device):
    case = BASE.but(device=device, lengths=(0, 5), queries=(1, 1))
    assert not run(case)[0].any()
    none = BASE.but(device=device, lengths=(), queries=())
    assert run(none).shape == (0, 8, 64)


def test_a_workspace_serves_call_after_call(device):
    """The counters are zero again after each call, whatever lengths and batch it had."""
    workspace = decode_workspace(8, 2, 64, device)
    for lengths in ((197, 1, 64), (220,), (3, 133)):
        case = BASE.but(device=device, lengths=lengths, queries=(1,) * len(lengths))
        result = torch.empty(len(lengths), 8, 64, device=device)
        assert run(case, split=PARTS, workspace=workspace, out=result) is result
        case.check(result)
        assert not workspace.counters.any()


@pytest.mark.parametrize("seqs", [1, 3, 16, 60, 300, 4000])
@pytest.mark.parametrize("context", [1, 300, 5000, 200_000])
def test_a_split_fits_its_workspace(seqs, context):
    processors = 132
    split = choose_split(seqs, 8, context, processors)
    programs = seqs * 8 * split.parts
    assert split.parts == 1 or programs <= MOST_PROGRAMS_PER_PROCESSOR * processors
    assert (split.parts - 1) * split.least_keys < context


@pytest.mark.parametrize(
    "change, keywords, message",
    [
        ({"cache": torch.float16}, {}, "float8_e4m3fn or as queries are"),
        ({"dim": 63}, {}, "D must be even"),
        ({}, {"split": Split(1 << 20, 16), "workspace": decode_workspace}, "workspace is too small"),
        ({}, {"out": torch.empty(1, 8, 64)}, "contiguous torch.float32"),
    ],
)
def test_refusals(change, keywords, message, device):
    if "workspace" in keywords:
        keywords = keywords | {"workspace": decode_workspace(8, 2, 64, device)}
    with pytest.raises(ConfigError, match=message):
        run(BASE.but(device=device, **change), **keywords)
