"""Attention of packed prompt chunks, against the reference's."""

import pytest
import torch
from tests.support.paged_case import FLOAT8, OPTIONS, PagedCase, every_option

from lamella_core.errors import ConfigError
from lamella_core.kernels.triton.attention import prefill_plan
from lamella_core.kernels.triton.attention.prefill import prefill_attention, ragged_attention
from lamella_core.kernels.triton.attention.prefill_plan import Tile

BASE = PagedCase(lengths=(5, 97, 130), queries=(5, 33, 1))
HALVES = (torch.bfloat16, torch.float16)


def run(case: PagedCase, **keywords) -> torch.Tensor:
    q, k, v, tables, rows = case.tensors()
    starts, context = case.starts.to(case.device), case.context.to(case.device)
    longest = max(case.queries, default=0)
    return prefill_attention(
        q, k, v, tables, rows, starts, context, max_query_len=longest, **case.keywords(), **keywords
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_it_is_the_reference(device, dtype):
    case = BASE.but(device=device, dtype=dtype)
    case.check(run(case))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_float8_cache(device, dtype):
    case = BASE.but(device=device, dtype=dtype, cache=FLOAT8, kv_scales=(0.5, 2.0))
    case.check(run(case), None if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("cache", [None, FLOAT8], ids=["own", "float8"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_sizes(device, dim, cache):
    case = BASE.but(device=device, dtype=torch.bfloat16, cache=cache, dim=dim, lengths=(40, 70), queries=(9, 20))
    case.check(run(case))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (71, 1)])
def test_groups(device, heads, kv_heads):
    case = BASE.but(device=device, heads=heads, kv_heads=kv_heads, lengths=(40, 70), queries=(9, 20))
    case.check(run(case, tile=Tile(64, 32, 4, 1)))


@pytest.mark.parametrize("page", [8, 64, 128])
@pytest.mark.parametrize("tile", [Tile(16, 16, 1, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)], ids=str)
def test_blocks_and_tiles(device, page, tile):
    case = BASE.but(device=device, page=page, dtype=torch.bfloat16, heads=4)
    case.check(run(case, tile=tile))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(device, name):
    case = BASE.but(device=device, options=OPTIONS[name])
    case.check(run(case, tile=Tile(64, 64, 4, 1)))


def test_rounded_alibi_beyond_what_bfloat16_counts(device):
    case = BASE.but(device=device, lengths=(300, 521), queries=(7, 2), options=OPTIONS["rounded alibi"])
    case.check(run(case, tile=Tile(64, 64, 4, 1)))
    case = case.but(cache=FLOAT8, kv_scales=(0.5, 2.0))
    case.check(run(case, tile=Tile(64, 64, 4, 1)))


@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 1), Tile(64, 32, 4, 1)], ids=str)
@pytest.mark.parametrize("prefixes", [(5, 0, 40), (3, 97, 70)], ids=str)
def test_prefixes(device, prefixes, tile):
    """Queries of a prefix see all of it, those behind it what is before them."""
    options = {"prefix_lens": torch.tensor(prefixes, dtype=torch.int32)}
    case = BASE.but(
        device=device, lengths=(5, 97, 130), queries=(5, 33, 130), heads=2, kv_heads=1, dim=16, options=options
    )
    case.check(run(case, tile=tile))


def test_all_at_once_in_float8(device):
    case = BASE.but(device=device, dtype=torch.bfloat16, cache=FLOAT8, kv_scales=(2.0, 0.5), options=every_option(8))
    case.check(run(case))


def test_float8_result(device):
    case = BASE.but(device=device)
    result = run(case, out_scale=torch.tensor(0.02, device=device))
    assert result.dtype == FLOAT8
    torch.testing.assert_close(result.float().cpu() * 0.02, case.expected(), rtol=0.07, atol=1e-4)


@pytest.mark.parametrize("queries", [(1,) * 9, (40, 1, 1, 1, 1), (1, 0, 31, 0, 64), (17, 16, 15)], ids=str)
def test_one_long_among_many_short(device, queries):
    """Every row gets a tile, wherever its sequence begins, and empty sequences do no harm."""
    lengths = tuple(count + 3 * i for i, count in enumerate(queries))
    case = BASE.but(device=device, lengths=lengths, queries=queries, heads=4, kv_heads=1)
    case.check(run(case, tile=Tile(16, 16, 4, 1)))


def test_more_sequences_than_are_counted_at_once(device):
    queries = tuple(int(i % 60 == 59) for i in range(300))
    case = BASE.but(device=device, lengths=(3,) * 300, queries=queries, heads=2, kv_heads=1, dim=16, page=8)
    case.check(run(case))


def test_rows_outside_the_sequences_stay(device):
    """A step's decode rows come first in the same tensors: query_start begins behind them."""
    case = BASE.but(device=device)
    q, k, v, tables, rows = case.tensors()
    padded = torch.cat([q.new_ones(6, *q.shape[1:]), q, q.new_ones(2, *q.shape[1:])])
    result = torch.full_like(padded, 7.0)
    starts, context = case.starts.to(device) + 6, case.context.to(device)
    prefill_attention(padded, k, v, tables, rows, starts, context, max_query_len=33, out=result, **case.keywords())
    case.check(result[6:-2])
    assert (result[:6] == 7.0).all() and (result[-2:] == 7.0).all()


def test_a_chunk_at_a_time_is_the_whole(device):
    whole = BASE.but(device=device, lengths=(40,), queries=(40,))
    expected = run(whole)
    for first, last in ((0, 17), (17, 18), (18, 40)):
        q, k, v, tables, rows = whole.tensors()
        starts = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        context = torch.tensor([last], dtype=torch.int32, device=device)
        part = prefill_attention(
            q[first:last], k, v, tables, rows, starts, context, max_query_len=last - first, **whole.keywords()
        )
        torch.testing.assert_close(part, expected[first:last], rtol=1e-5, atol=1e-5)


def test_nothing(device):
    assert run(BASE.but(device=device, lengths=(), queries=())).shape == (0, 8, 64)


@pytest.mark.parametrize("name", [None, "window and sinks", "all", "sparse", "rounded alibi", "prefixes"])
def test_sequences_over_themselves(device, name):
    """Without a cache: the same as over one that holds the same keys, also for a part of the rows."""
    options = OPTIONS.get(name, {})
    if name == "prefixes":
        options = {"prefix_lens": torch.tensor([3, 60], dtype=torch.int32)}
    case = BASE.but(device=device, dtype=torch.bfloat16, lengths=(5, 70), queries=(5, 70), dim=16, options=options)
    q, k_cache, v_cache, *_ = case.tensors()
    fused = torch.zeros(sum(case.queries), 2 * case.kv_heads, case.dim, dtype=q.dtype, device=device)
    k, v = fused[:, : case.kv_heads], fused[:, case.kv_heads :]
    for token, slot in enumerate(case.slots()):
        k[token], v[token] = (cache[slot // case.page, :, slot % case.page] for cache in (k_cache, v_cache))
    starts = case.starts.to(device)
    small = Tile(64, 32, 4, 2)
    result = ragged_attention(q, k, v, starts, max_query_len=70, tile=small, **case.keywords())
    case.check(result)
    rest = torch.full_like(result, 7.0)
    options = case.keywords()
    if name == "prefixes":
        options["prefix_lens"] = options["prefix_lens"][1:]
    ragged_attention(q, k, v, starts[1:], max_query_len=70, out=rest, tile=small, **options)
    torch.testing.assert_close(rest[5:], result[5:], rtol=2e-2, atol=2e-2)
    assert (rest[:5] == 7.0).all()
    apart = ragged_attention(q, k.contiguous(), v, starts, max_query_len=70, tile=small, **case.keywords())
    assert torch.equal(apart, result)


def test_a_window_over_whole_blocks(device):
    case = BASE.but(device=device, page=64, dim=16, dtype=torch.bfloat16, options=OPTIONS["window and sinks"])
    case.check(run(case, tile=Tile(64, 32, 4, 2)))


def test_keys_that_do_not_belong_to_the_queries(device):
    q, k = torch.zeros(4, 8, 64, device=device), torch.zeros(5, 2, 64, device=device)
    with pytest.raises(ConfigError, match="differ in dtype, shape or strides"):
        ragged_attention(q, k, k, torch.tensor([0, 4], dtype=torch.int32, device=device), max_query_len=4, scale=1.0)


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("dim, key_bytes", [(64, 2), (128, 2), (256, 2), (64, 1), (128, 1), (256, 1)])
def test_tiles_fit_the_device(monkeypatch, shared, dim, key_bytes):
    monkeypatch.setattr(prefill_plan, "shared_memory", lambda device: shared << 10)
    for rows, keys in ((16, 16), (64, 4096), (512, 128), (8192, 2048), (32768, 8192)):
        tile = prefill_plan.choose_tile(dim, 2, key_bytes, rows, keys)
        tile = prefill_plan.fitting.__wrapped__(tile, dim * key_bytes, dim * 2, torch.device("cpu"))
        assert tile.block_m * dim * 2 + 2 * tile.num_stages * tile.block_n * dim * key_bytes <= shared << 10
