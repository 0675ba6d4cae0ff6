"""Attention over prompts on Hopper against float32 and Triton's kernels; only on GPUs of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.support.engines import engine_of, prompt_logprobs
from tests.support.prompt_reference import attended
from tests.support.tiny_base import BASE
from tests.support.tiny_models import TINY, hf_dir
from torch import Tensor

from lamella_core.kernels.cuda import prompt_attention as module
from lamella_core.kernels.cuda.prompt_attention import BegunKeys, prompt_attention
from lamella_core.kernels.triton.attention.prefill import ragged_attention
from lamella_core.quantization.config import QuantConfig
from lamella_executor.attention import hopper_prompts

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LENGTHS = [(1,), (128,), (1000,), (127, 1, 129), (300, 257, 0, 64, 2, 511)]
BOUNDS = {BF16: (5e-3, 2e-2), FP16: (1e-3, 4e-3)}  # of all results together, relative; of each
SCALE = 0.09
WIDE = {**BASE, "hidden_size": 256, "max_position_embeddings": 1024}  # heads of 64


@pytest.fixture(autouse=True)
def capable() -> None:
    if torch.cuda.get_device_capability() != module.driver.HOPPER:
        pytest.skip("kernels for compute capability 9.0")


def inputs(
    tokens: int, dtype: torch.dtype = BF16, heads: int = 8, group: int = 4, dim: int = 128, seed: int = 0
) -> Any:
    """Returns queries, keys and values, parts of one projection."""
    generator = torch.Generator("cuda").manual_seed(seed)
    kv_heads = heads // group
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, device="cuda", generator=generator).to(dtype)
    return fused.split([heads, kv_heads, kv_heads], dim=1)


def starts(lengths: Sequence[int], first: int = 0) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0).int() + first


def ours(q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, *, out: Tensor | None = None, **keywords: Any) -> Tensor:
    """The kernel's results; those that it does not write are no numbers, or what was in ``out``."""
    if out is None:
        out = torch.full(q.shape, torch.nan, device="cuda").to(q.dtype if keywords.get("out_scale") is None else FP8)
    assert prompt_attention(q, k, v, query_start, scale=SCALE, out=out, **keywords) is out
    return out


def check(result: Tensor, expected: Tensor) -> None:
    together, each = BOUNDS[result.dtype]
    torch.testing.assert_close(result.float(), expected, atol=each, rtol=each)
    assert (result.float() - expected).norm() <= together * expected.norm()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "group"), [(4, 1), (6, 3), (8, 4)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_whole_prompts(lengths, heads, group, dim, dtype):
    q, k, v = inputs(sum(lengths), dtype, heads, group, dim)
    check(ours(q, k, v, starts(lengths)), attended(q, k, v, starts(lengths), scale=SCALE))


@pytest.mark.parametrize("blocks", [1, 3, None])
@pytest.mark.parametrize("dim", [64, 128])
def test_blocks_attend_several_tiles(dim, blocks, monkeypatch):
    """Those of long and short prompts in turn, at all stages of their rings."""
    lengths = (2000, 1, 700, 129, 37, 1500, *[5] * 40)
    q, k, v = inputs(sum(lengths), dim=dim)
    if blocks is not None:
        monkeypatch.setattr(module, "_processors", lambda _: blocks)
    check(ours(q, k, v, starts(lengths)), attended(q, k, v, starts(lengths), scale=SCALE))


@pytest.mark.parametrize("first", [1, 100, 128, 300])
def test_rows_outside_the_sequences_stay(first):
    """A step's decoding rows come first in the same tensors."""
    lengths = (200, 1, 130)
    q, k, v = inputs(first + sum(lengths) + 70)
    inside = slice(first, first + sum(lengths))
    for x in (q, k, v):
        x[:first], x[inside.stop :] = torch.nan, torch.nan
    result = ours(q, k, v, starts(lengths, first), out=torch.full(q.shape, 7.0, dtype=BF16, device="cuda"))
    check(result[inside], attended(q, k, v, starts(lengths, first), scale=SCALE)[inside])
    assert (result[:first] == 7.0).all() and (result[inside.stop :] == 7.0).all()


def test_sequences_without_queries():
    q, k, v = inputs(5)
    out = torch.full(q.shape, 7.0, dtype=BF16, device="cuda")
    assert (ours(q, k, v, starts((0, 0, 0)), out=out) == 7.0).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("lengths", "contexts"),
    [
        ((100, 60), (300,)),
        ((64, 200, 128), (1000, 328)),
        ((257, 1), (385, 1)),
        ((5, 700), (133, 828)),
        ((1, 0, 128, 40), (128, 9, 128, 2000)),
    ],
    ids=str,
)
def test_begun_prompts(lengths, contexts, dim, dtype):
    """Followed by whole ones; what lies after their keys is no number, nor are keys of their own."""
    q, k, v = inputs(sum(lengths), dtype, dim=dim)
    for x in (k, v):
        x[: sum(lengths[: len(contexts)])] = torch.nan
    pair = torch.randn(2, sum(contexts) + 200, 2, dim, device="cuda").to(dtype)
    pair[:, sum(contexts) :] = torch.nan
    lengths_of_keys = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    for scales in (None, torch.tensor([0.5, 2.0], device="cuda")):
        begun = BegunKeys(*pair, lengths_of_keys, scales)
        expected = attended(q, k, v, starts(lengths), scale=SCALE, begun=begun)
        result = ours(q, k, v, starts(lengths), begun=begun)
        factor = 1.0 if scales is None else 2.0  # bounds of each are those of values around 1
        check(result / factor, expected / factor)


def test_a_chunk_at_a_time_is_the_whole():
    """The same bits where tiles of keys are the same: a query meets them in the same order."""
    q, k, v = inputs(700)
    whole = ours(q, k, v, starts((700,)))
    for first, last in ((0, 256), (256, 384), (384, 700)):
        begun = BegunKeys(k[:last].contiguous(), v[:last].contiguous(), starts((last,))[1:])
        part = ours(q[first:last], k[first:last], v[first:last], starts((last - first,)), begun=begun)
        assert same_bits(part, whole[first:last])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_float8_results(lengths, dim):
    """As Triton's kernel gives them: nine of ten the same, others the next float8 or, near zero, as small."""
    q, k, v = inputs(sum(lengths), dim=dim)
    out_scale = torch.tensor(0.01, device="cuda")
    result = ours(q, k, v, starts(lengths), out_scale=out_scale)
    theirs = ragged_attention(
        q, k, v, starts(lengths), max_query_len=max(lengths), scale=SCALE, out_scale=out_scale
    )  # fmt: skip
    assert (result.view(torch.uint8) != theirs.view(torch.uint8)).float().mean() < 0.1
    torch.testing.assert_close(result.float(), theirs.float(), rtol=0.13, atol=0.5)  # a step is 1/8 at most
    expected = (attended(q, k, v, starts(lengths), scale=SCALE) / out_scale).clamp(-448, 448)
    torch.testing.assert_close(result.float(), expected, rtol=0.07, atol=0.5)  # half a step is 1/16


def test_other_sequences_stay_outside():
    """Also where these end within a tile of keys that is not theirs alone."""
    lengths = (100, 200, 77)
    q, k, v = inputs(sum(lengths))
    clean = ours(q, k, v, starts(lengths))
    k[100:300], v[100:300] = torch.nan, torch.inf
    spoiled = ours(q, k, v, starts(lengths))
    assert same_bits(spoiled[:100], clean[:100]) and same_bits(spoiled[300:], clean[300:])
    assert spoiled[100:300].isnan().all()


def test_recorded_in_a_graph():
    """Of a stream that has launched it before; counters are zero for every replay."""
    lengths, stream = (300, 1000, 64), torch.cuda.Stream()
    q, k, v = inputs(sum(lengths))
    query_start = starts(lengths)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        prompt_attention(q, k, v, query_start, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = prompt_attention(q, k, v, query_start, scale=SCALE)
    assert recorded is not None
    for seed in range(1, 4):
        for x, other in zip((q, k, v), inputs(sum(lengths), seed=seed), strict=True):
            x.copy_(other)
        graph.replay()
        assert same_bits(recorded, ours(q, k, v, query_start))


def test_on_two_streams_at_once():
    lengths = (900, 30, 513)
    calls = [(*inputs(sum(lengths), seed=seed), starts(lengths)) for seed in range(2)]
    expected = [ours(*call) for call in calls]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in calls], []
    for _ in range(50):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(ours(*call))
    torch.cuda.synchronize()
    assert all(same_bits(result, expected[i % 2]) for i, result in enumerate(results))


def test_the_same_bits_every_time():
    lengths = (700, 1, 130, 2000)
    q, k, v = inputs(sum(lengths))
    first, *others = (ours(q, k, v, starts(lengths)) for _ in range(100))
    assert all(same_bits(first, other) for other in others)
    device = torch.cuda.current_device()
    assert not module._counters(device, torch._C._cuda_getCurrentRawStream(device)).any()


def test_what_is_not_served():
    q, k, v = inputs(300)
    assert module.serves(q, 2) and module.serves(q, 2, True) and not module.serves(q, 3)
    for refused in (q.float(), q[..., :96], q[..., 4:68], q[..., ::2]):
        assert not module.serves(refused, 2)
    for keys in ((k.half(), v), (k[..., 4:], v[..., 4:])):
        assert prompt_attention(q, *keys, starts((300,)), scale=SCALE) is None
    assert prompt_attention(q, k, v, starts((300,)), scale=SCALE, out=torch.empty_like(q, dtype=FP8)) is None


QUANTIZATIONS = {
    # of a log-probability: largest and mean difference with another kernel; with other chunks of prompts
    "bf16": (None, (0.3, 0.03), (0.3, 0.03)),
    "float8 cache": (QuantConfig(kv_cache_quant_algo="FP8"), (0.6, 0.06), (1.5, 0.2)),
    "float8": (QuantConfig("FP8", kv_cache_quant_algo="FP8"), (1.5, 0.2), (2.5, 0.4)),
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_an_engine_with_it_answers_like_one_without(monkeypatch, name):
    """Prompts whole and in chunks. bfloat16 alone moves these log-probabilities by 0.03 on average."""
    quantization, other_kernel, other_chunks = QUANTIZATIONS[name]
    monkeypatch.setitem(TINY["LlamaForCausalLM"], "wide_heads", WIDE)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 131, (size,), generator=generator).tolist() for size in (700, 40, 7, 300)]
    counts: list[tuple[int, int]] = []  # sequences, and begun ones, of each call

    def counted(q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, **keywords: Any) -> Tensor | None:
        out = prompt_attention(q, k, v, query_start, **keywords)
        assert out is not None
        begun = keywords["begun"]
        counts.append((len(query_start) - 1, 0 if begun is None else len(begun.lengths)))
        return out

    def answers(max_num_tokens: int, least_prompt: int) -> Tensor:
        counts.clear()
        monkeypatch.setattr(hopper_prompts, "LEAST_PROMPT", least_prompt)
        engine = engine_of(
            hf_dir("LlamaForCausalLM", "wide_heads"), "cuda", "bfloat16", tokens_per_block=16,
            max_num_tokens=max_num_tokens, load={"quant_config": quantization} if quantization else {},
        )  # fmt: skip
        return torch.tensor(sum(prompt_logprobs(engine, prompts, attn_backend="triton"), []))

    monkeypatch.setattr(hopper_prompts, "prompt_attention", counted)
    chunked = answers(256, 1)
    assert any(begun for _, begun in counts) and any(0 < begun < number for number, begun in counts)
    whole = answers(2048, 1)
    assert any(number > 1 and not begun for number, begun in counts)
    for max_num_tokens, result in ((256, chunked), (2048, whole)):
        assert_near(result, answers(max_num_tokens, 1 << 30), other_kernel)
        assert not counts
    assert_near(chunked, whole, other_chunks)


def assert_near(a: Tensor, b: Tensor, bounds: tuple[float, float]) -> None:
    difference = (a - b).abs()
    assert difference.max() < bounds[0] and difference.mean() < bounds[1]
