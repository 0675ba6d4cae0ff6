"""FlashInfer's attention equals the Triton kernels' on a GPU, within the bounds stated here.

Differences are root-mean-square ones relative to the results. Over bfloat16 caches both sum in float32 and round the
results to bfloat16 (2^-9 at most, each). Over float8 caches XQA also rounds queries and softmax weights to float8 (3
mantissa bits: 2^-4 at most, about 2.6 % root mean square, in each of the two products), and float8 results once more.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tests.support.attention_steps import make_layer, make_queries, make_step
from torch import Tensor

from lamella_executor.attention.backend import AttentionStep, LayerCall
from lamella_executor.attention.flashinfer_backend import FlashInferAttention
from lamella_executor.attention.paged_cpu import LayerWindow

if find_spec("flashinfer") is None:
    pytest.skip("flashinfer is not installed", allow_module_level=True)

FLOAT8 = torch.float8_e4m3fn
BF16_BOUND, FLOAT8_BOUND = 0.01, 0.08
SAME_BOUND = 0.001  # of one kernel's results; leaves room for another order in which parts are joined
CONTEXTS = [1, 32, 33, 700, 2049, 130, 300, 900]
QUERIES = [1, 1, 1, 1, 1, 130, 77, 5]
NUM_DECODE = 5
HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}


class NoFallback:
    """A fallback that must not be asked: it would compare a backend with itself."""

    name = "none"
    is_capturable = True

    def begin(self, step: AttentionStep) -> NoFallback:
        raise AssertionError("FlashInfer was expected to serve this call; its log says why it does not")


@pytest.fixture(scope="module")
def flashinfer() -> FlashInferAttention:
    if torch.cuda.get_device_capability()[0] not in (9, 12):
        pytest.skip("XQA is not for this GPU")
    return FlashInferAttention(NoFallback())


def triton_results(step: AttentionStep, layer: LayerCall, q: Tensor) -> tuple[Tensor, Tensor]:
    from lamella_executor.attention.triton_backend import TritonAttention

    begun = TritonAttention().begin(step)
    return begun.decode(q[:NUM_DECODE], layer), begun.prefill(q[NUM_DECODE:], layer)


def assert_near(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert bool(torch.isfinite(actual.float()).all())
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert float(difference) <= bound


def mixed_step(page_size: int) -> AttentionStep:
    return make_step("cuda", CONTEXTS, QUERIES, page_size=page_size, num_blocks=256)


@pytest.mark.parametrize("page_size", [32, 64])
def test_bfloat16_caches(flashinfer: FlashInferAttention, page_size: int) -> None:
    step = mixed_step(page_size)
    layer = make_layer("cuda", num_blocks=256, page_size=page_size, **HEADS)
    q = make_queries(step, layer)
    begun = flashinfer.begin(step)
    for actual, expected in zip(
        (begun.decode(q[:NUM_DECODE], layer), begun.prefill(q[NUM_DECODE:], layer)), triton_results(step, layer, q)
    ):
        assert_near(actual, expected, BF16_BOUND)


def test_float8_caches(flashinfer: FlashInferAttention) -> None:
    step = mixed_step(32)
    scales = torch.tensor([0.5, 1.5], device="cuda")
    layer = make_layer("cuda", num_blocks=256, page_size=32, cache_dtype=FLOAT8, kv_scales=scales, **HEADS)
    q = make_queries(step, layer)
    begun = flashinfer.begin(step)
    decoded, prompts = triton_results(step, layer, q)
    assert_near(begun.decode(q[:NUM_DECODE], layer), decoded, FLOAT8_BOUND)
    assert_near(begun.prefill(q[NUM_DECODE:], layer), prompts, BF16_BOUND)


def test_float8_results(flashinfer: FlashInferAttention) -> None:
    step = make_step("cuda", CONTEXTS[:NUM_DECODE], [1] * NUM_DECODE, page_size=32, num_blocks=256)
    layer = make_layer("cuda", num_blocks=256, page_size=32, cache_dtype=FLOAT8, **HEADS)
    q, scale = make_queries(step, layer), torch.tensor(0.01, device="cuda")
    plain = flashinfer.begin(step).decode(q, layer)
    quantized = flashinfer.begin(step).decode(q, replace(layer, out_scale=scale))
    assert quantized.dtype == FLOAT8
    assert_near(quantized.float() * scale, plain, 0.04)


def test_windows(flashinfer: FlashInferAttention) -> None:
    """Decoding only: the prompt kernels with windows are the same template, and take minutes to compile."""
    step = make_step("cuda", CONTEXTS[:NUM_DECODE], [1] * NUM_DECODE, page_size=32, num_blocks=256)
    step.block_tables[step.table_rows[4].long(), :8] = -1  # a window of 200 cannot see them: given up by the scheduler
    layer = make_layer("cuda", num_blocks=256, page_size=32, window=LayerWindow(200), **HEADS)
    q = make_queries(step, layer)
    from lamella_executor.attention.triton_backend import TritonAttention

    expected = TritonAttention().begin(step).decode(q, layer)
    assert_near(flashinfer.begin(step).decode(q, layer), expected, BF16_BOUND)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FLOAT8])
def test_a_replayed_graph_follows_lengths_and_tables(flashinfer: FlashInferAttention, cache_dtype: torch.dtype) -> None:
    """Captured over short sequences under the bound of the longest, replayed over others: as eager steps give."""
    layer = make_layer("cuda", num_blocks=256, page_size=32, cache_dtype=cache_dtype, **HEADS)
    eager = make_step("cuda", [700, 33, 1500, 64], [1] * 4, page_size=32, num_blocks=256)
    q = make_queries(eager, layer)
    expected = flashinfer.begin(eager).decode(q, layer)  # loads the kernels
    captured = replace(
        eager,
        host=None,
        context_lens=torch.ones_like(eager.context_lens),
        table_rows=torch.zeros_like(eager.table_rows),
        block_tables=eager.block_tables.clone().clamp_(min=0),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashinfer.begin(captured).decode(q, layer)
    captured.context_lens.copy_(eager.context_lens)
    captured.table_rows.copy_(eager.table_rows)
    for _ in range(3):
        graph.replay()
    assert_near(out, expected, SAME_BOUND)


def test_plans_of_steps_in_flight_are_kept(flashinfer: FlashInferAttention) -> None:
    """The host plans several steps ahead of the device, whose results are those of one step at a time."""
    layer = make_layer("cuda", num_blocks=256, page_size=32, **HEADS)
    steps = [
        make_step("cuda", contexts, queries, page_size=32, num_blocks=256)
        for contexts, queries in (([900, 70], [300, 60]), ([64, 2000], [64, 9]), ([5, 1200], [5, 1200]), ([31], [31]))
    ]
    queries = [make_queries(step, layer) for step in steps]
    expected = []
    for step, q in zip(steps, queries):
        expected.append(flashinfer.begin(step).prefill(q, layer))
        torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about 0.1 s in which the device does nothing
    ahead = [flashinfer.begin(step).prefill(q, layer) for step, q in zip(steps, queries)]
    for actual, wanted in zip(ahead, expected):
        assert_near(actual, wanted, SAME_BOUND)
