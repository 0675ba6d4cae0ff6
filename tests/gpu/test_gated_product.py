"""The gate in products of many rows against a kernel of its own; only on GPUs of compute capability 9.0.

Operands are small whole numbers, so that sums are exact in whichever order they are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.engines import engine_of, greedy, prompt_logprobs
from tests.support.tiny_base import BASE
from tests.support.tiny_models import TINY, hf_dir

from lamella_core.kernels.cuda import gated_product as module
from lamella_core.kernels.cuda.gated_product import gated_product
from lamella_core.kernels.fused import SiluGateAfter
from lamella_core.kernels.gpu_matmul import cublas, cublas_fp8
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton.activation import silu_and_mul
from lamella_core.quantization.config import QuantConfig

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
ROWS = (1, 127, 128, 129, 256, 300, 513, 2500)
ODD_ROWS = (128, 384, 640, 2176, 2304 + 128, 4096 + 1)  # the last row tile is without another; one to three groups
KINDS = [(BF16, BF16), (FP16, FP16), (FP8, BF16), (FP8, FP16)]  # of the operands, of the product
WIDE = {**BASE, "intermediate_size": 256, "max_position_embeddings": 512}


@pytest.fixture(autouse=True)
def capable() -> None:
    if torch.cuda.get_device_capability() != module.driver.HOPPER:
        pytest.skip("kernels for compute capability 9.0")


@pytest.fixture(params=[0.0, 0.4, 1.0], ids=["whole", "some in halves", "in halves"])
def halves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So large a part of the pairs, the last ones, is computed in halves, whatever the GPU's size."""
    monkeypatch.setattr(module, "num_halved", lambda pairs, _: int(request.param * pairs))


def whole(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-4, 5, shape, device="cuda", generator=generator).to(dtype)


def operands(
    rows: int, n: int, k: int, kind: tuple[torch.dtype, torch.dtype], per_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Scales | None]:
    """Returns x [rows, k], w [n, k] and scales that are powers of two."""
    x, w = whole(rows, k, dtype=kind[0], seed=rows), whole(n, k, dtype=kind[0], seed=n)
    if kind[0] != FP8:
        return x, w, None
    exponents = torch.arange(rows if per_row else 1, device="cuda") % 3 - 4
    x_scale = torch.exp2(exponents.float())[:, None] if per_row else torch.exp2(exponents.float()).reshape(())
    return x, w, Scales(x_scale, torch.tensor(0.25, device="cuda"), kind[1])


def product(x: torch.Tensor, w: torch.Tensor, scales: Scales | None) -> torch.Tensor:
    return cublas(x, w, None) if scales is None else cublas_fp8(x, w, None, scales)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether numbers are the same; zeros of both signs are, and all that is no number."""
    return a.dtype == b.dtype and torch.equal(*(x.float().nan_to_num(1e9) for x in (a, b)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_gate(rows, kind, halves):
    """Odd numbers of tiles, and a last step of K that is not whole."""
    for width, k in ((384, 272), (256, 128), (128, 16)):
        x, w, scales = operands(rows, 2 * width, k, kind)
        for out_scale in (None, torch.tensor(0.37, device="cuda")):
            ours = gated_product(x, w, None, scales, SiluGateAfter(out_scale))
            assert ours is not None and ours.shape == (rows, width)
            assert equal(ours, silu_and_mul(product(x, w, scales), out_scale))


@pytest.mark.parametrize("rows", ODD_ROWS)
def test_a_row_tile_without_another(rows, halves, monkeypatch):
    """Odd and even numbers of weight tiles, in one turn and in several."""
    for tiles in (1, 3, 8):
        x, w, scales = operands(rows, 256 * tiles, 272, (FP8, BF16))
        separate = product(x, w, scales)
        for clusters in (1, 5, 66):
            monkeypatch.setattr(module, "_pairs_at_once", lambda _, clusters=clusters: clusters)
            for out_scale in (None, torch.tensor(0.37, device="cuda")):
                ours = gated_product(x, w, None, scales, SiluGateAfter(out_scale))
                assert ours is not None and equal(ours, silu_and_mul(separate, out_scale))


@pytest.mark.parametrize("clusters", [1, 3, None])
@pytest.mark.parametrize("kind", [(BF16, BF16), (FP8, BF16)], ids=str)
def test_clusters_take_several_turns(kind, clusters, halves, monkeypatch):
    """As many steps as no multiple of the stages, so that turns begin at all of them; pairs of both kinds."""
    x, w, scales = operands(8292, 768, 272 if kind[0] == FP8 else 656, kind)
    expected = silu_and_mul(product(x, w, scales))
    if clusters is not None:
        monkeypatch.setattr(module, "_pairs_at_once", lambda _: clusters)
    else:
        assert module.num_pairs(8292, 3) > module._pairs_at_once(0)
    ours = gated_product(x, w, None, scales, SiluGateAfter(None))
    assert ours is not None and equal(ours, expected)


def test_a_half_empty_turn_in_halves():
    """As it is launched where nothing is forced: whole turns, then a last one of tall and wide pairs."""
    at_once = module._pairs_at_once(0)
    pairs = {tiles: module.num_pairs(640, tiles) for tiles in range(1, 200)}
    tiles = next(n for n in pairs if pairs[n] > 2 * at_once and module.num_halved(pairs[n], at_once) > 4)
    x, w, scales = operands(640, 256 * tiles, 144, (FP8, BF16))
    ours = gated_product(x, w, None, scales, SiluGateAfter(None))
    assert ours is not None and equal(ours, silu_and_mul(product(x, w, scales)))


def test_gate_of_rows_with_scales_of_their_own(halves):
    x, w, scales = operands(300, 512, 256, (FP8, BF16), per_row=True)
    ours = gated_product(x, w, None, scales, SiluGateAfter(None))
    assert ours is not None and equal(ours, silu_and_mul(product(x, w, scales)))


def test_numbers_that_are_not_finite_saturate_as_elsewhere(halves):
    x, w, _ = operands(256, 256, 64, (BF16, BF16))
    x[0], x[1, 0], x[2, 0] = 1e30, torch.inf, torch.nan
    scale = torch.tensor(1e-30, device="cuda")
    ours = gated_product(x, w, None, None, SiluGateAfter(scale))
    assert ours is not None and equal(ours, silu_and_mul(product(x, w, None), scale))


@pytest.mark.parametrize("rows", [640, 700])
def test_recorded_in_a_graph(rows, halves):
    x, w, scales = operands(rows, 1024, 512, (FP8, BF16))
    out_scale = torch.tensor(0.5, device="cuda")
    after = SiluGateAfter(out_scale)
    eager = gated_product(x, w, None, scales, after)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gated_product(x, w, None, scales, after)
    x.copy_(x.float().flip(0))
    graph.replay()
    assert eager is not None and recorded is not None and torch.equal(recorded.float(), eager.float().flip(0))


def test_the_same_bits_every_time(halves):
    x, w, scales = operands(2048, 2048, 1024, (FP8, BF16))
    x = (x.float() * 0.37).to(FP8)
    first, *others = (gated_product(x, w, None, scales, SiluGateAfter(None)) for _ in range(20))
    assert first is not None and all(other is not None and equal(first, other) for other in others)


def refused(change: Callable[[dict[str, Any]], None]) -> bool:
    x, w, scales = operands(256, 512, 128, (FP8, BF16))
    arguments = {"x": x, "w": w, "bias": None, "scales": scales, "after": SiluGateAfter(None)}
    assert gated_product(**arguments) is not None
    change(arguments)
    return gated_product(**arguments) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(bias=torch.zeros(512, device="cuda")),
        lambda a: a.update(w=a["w"][:320]),
        lambda a: a.update(x=a["x"][:, :120].contiguous(), w=a["w"][:, :120].contiguous()),
        lambda a: a.update(x=a["x"][:, :112]),
        lambda a: a.update(scales=replace(a["scales"], w=torch.ones(512, device="cuda"))),
        lambda a: a.update(x=a["x"].float(), w=a["w"].float(), scales=None),
        lambda a: a.update(x=a["x"][:0]),
    ],
    ids=["bias", "width", "row bytes", "strides", "scale per output", "float32", "no rows"],
)
def test_what_is_not_served(change):
    assert refused(change)


@pytest.mark.parametrize("quantization", [None, QuantConfig("FP8", kv_cache_quant_algo="FP8")], ids=["bf16", "fp8"])
def test_an_engine_with_it_answers_like_one_without(monkeypatch, quantization):
    """Prompts of several hundred tokens, whole and in chunks, and recorded steps."""
    monkeypatch.setitem(TINY["LlamaForCausalLM"], "wide_inside", WIDE)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 131, (size,), generator=generator).tolist() for size in (300, 40, 7, 150)]
    rows: list[int] = []

    def counted(x: torch.Tensor, *args: Any) -> torch.Tensor | None:
        out = gated_product(x, *args)
        assert out is not None
        rows.append(len(x))
        return out

    monkeypatch.setattr(module, "gated_product", counted)
    monkeypatch.setattr(module, "offers", lambda *_: True)
    engine = engine_of(
        hf_dir("LlamaForCausalLM", "wide_inside"), "cuda", "bfloat16", tokens_per_block=16, max_batch_size=32,
        load={"quant_config": quantization} if quantization else {},
    )  # fmt: skip
    ours = prompt_logprobs(engine, prompts)
    greedy(engine, prompts * 8)
    assert 256 in rows and 32 in rows  # a whole step of prompts, a recorded one of tokens
    monkeypatch.setattr(module, "offers", lambda *_: False)
    theirs = prompt_logprobs(engine, prompts)
    bound = 0.05 if quantization is None else 0.3
    for mine, other in zip(ours, theirs, strict=True):
        difference = (torch.tensor(mine) - torch.tensor(other)).abs()
        assert difference.max() < bound and difference.mean() < bound / 10
