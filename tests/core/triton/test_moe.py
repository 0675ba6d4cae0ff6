"""Grouped products over experts against the layer's loop on the CPU: every dtype, routing, share of the experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lamella_core.kernels.experts import ExpertProjection, ExpertStack
from lamella_core.kernels.triton import moe
from lamella_core.kernels.triton.launch import has_wgmma
from lamella_core.kernels.triton.moe_align import make_blocks, most_blocks
from lamella_core.layers.activation import ClampedSwiglu
from lamella_core.layers.moe import GatedExperts
from lamella_core.layers.parameter import set_parameter
from lamella_core.layers.plain_experts import PlainExperts
from lamella_core.mapping import Mapping
from lamella_core.models.mixtral import MixtralConfig
from lamella_core.quantization.config import QuantConfig

FP8 = torch.float8_e4m3fn
NUM_EXPERTS, TOP_K, H, INNER = 6, 2, 48, 40  # sizes that fill no tile
ALIGNED = 48  # an inner size whose float8 rows are whole units of 16 bytes
# Of the largest result: roundings of what is between the products, which the loop keeps wider or narrower.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SMALL = moe.Tile(block_m=16, block_n=32, block_bytes=64, num_warps=4, num_stages=2)
TILES = [
    SMALL,
    dataclasses.replace(SMALL, swap=True, group=1),
    moe.Tile(block_m=32, block_n=64, block_bytes=128, num_warps=4, num_stages=3),
]
SORTED = moe.SortedTile(block_m=16, block_n=64, block_bytes=64, num_warps=4, num_stages=2, group=2)
# In the interpreter, numbers of rows that nobody reads are random bits.
PADDED = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator)


def layer(dtype: torch.dtype = torch.float32, quantization: QuantConfig | None = None, **options: Any) -> GatedExperts:
    """Returns a layer of random weights on the CPU; of ``ep`` = (rank, ranks) only that rank's experts."""
    rank, ranks = options.pop("ep", (0, 1))
    inner = options.pop("inner", INNER)
    config = MixtralConfig(
        architecture="MixtralForCausalLM", model_type="mixtral", dtype=str(dtype).removeprefix("torch."),
        vocab_size=8, hidden_size=H, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=6, head_dim=8,
        intermediate_size=inner, max_position_embeddings=8, hidden_act=options.pop("act", "silu"),
        mapping=Mapping(world_size=ranks, tp_size=ranks, moe_ep_size=ranks, rank=rank),
        quantization=quantization or QuantConfig(),
    )  # fmt: skip
    made = options.pop("kind", GatedExperts)(config, NUM_EXPERTS, inner, name="layers.0.mlp.experts", **options)
    for seed, (name, parameter) in enumerate(list(made.named_parameters())):
        if name.endswith("scale"):
            data = 0.02 * (1.0 + numbers(*parameter.shape, seed=seed).abs())
        elif parameter.dtype == FP8:
            data = (30 * numbers(*parameter.shape, seed=seed)).to(FP8)
        else:
            data = 0.3 * numbers(*parameter.shape, seed=seed)
        set_parameter(made, name, data.to(parameter.dtype))
    return made


def routing(tokens: int, kind: str = "random", top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor]:
    scores = numbers(tokens, NUM_EXPERTS, seed=7)
    if kind == "one_expert":  # all tokens go to expert 3 first
        scores[:, 3] = 100.0
    if kind == "some_empty":
        scores[:, 1:4] = -100.0
    weights, experts = torch.softmax(scores.clamp(max=4.0), dim=-1).topk(top_k, dim=-1)
    return experts, weights


def moved(stack: ExpertStack, device: str) -> ExpertStack:
    def projection(one: ExpertProjection) -> ExpertProjection:
        tensors = (one.weight, one.bias, one.weight_scale, one.input_scale)
        return ExpertProjection(*(None if tensor is None else tensor.data.to(device) for tensor in tensors))

    return dataclasses.replace(stack, gate_up=projection(stack.gate_up), down=projection(stack.down))


def check(
    made: GatedExperts,
    tokens: int,
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    tile: moe.Tile | moe.SortedTile = SMALL,
    kind: str = "random",
    bound: float | None = None,
) -> torch.Tensor:
    x, (experts, weights) = numbers(tokens, H, seed=3).to(dtype), routing(tokens, kind)
    expected = made(x, experts, weights)
    out = moe.gated_experts(x.to(device), experts.to(device), weights.to(device), moved(made.stack(), device), tile)
    out = out.cpu()
    assert out.dtype == dtype and out.shape == expected.shape and torch.isfinite(out).all()
    limit = BOUNDS[dtype] if bound is None else bound
    assert (out.double() - expected.double()).abs().max() <= limit * expected.double().abs().max()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 23])
def test_dtypes(tokens: int, dtype: torch.dtype, device: str) -> None:
    check(layer(dtype), tokens, device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_without_a_gate(dtype: torch.dtype, device: str) -> None:
    made = layer(dtype, kind=PlainExperts, act="relu2")
    assert made.gate_up_proj.weight.shape == (NUM_EXPERTS, INNER, H)
    check(made, 23, device, dtype=dtype)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("kind", ["random", "one_expert", "some_empty"])
def test_tiles_and_routings(kind: str, tile: moe.Tile, device: str) -> None:
    check(layer(), 23, device, tile=tile, kind=kind)


def test_no_tokens(device: str) -> None:
    experts, weights = routing(0)
    out = moe.gated_experts(
        torch.empty(0, H, device=device), experts.to(device), weights.to(device), moved(layer().stack(), device)
    )
    assert out.shape == (0, H)


@pytest.mark.parametrize("tokens", [1, 19])
def test_ranks_of_experts_add_up(tokens: int, device: str) -> None:
    x, (experts, weights) = numbers(tokens, H, seed=3), routing(tokens)
    whole = layer()
    parts = []
    for rank in range(3):
        made = layer(ep=(rank, 3))
        for name, parameter in list(made.named_parameters()):
            held = slice(2 * rank, 2 * rank + 2)
            assert parameter.shape[0] == 2
            set_parameter(made, name, whole.get_parameter(name)[held].clone())
        parts.append(check(made, tokens, device))
    expected = whole(x, experts, weights)
    assert (sum(parts) - expected).abs().max() <= BOUNDS[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("options", [{"scale_inputs": True}, {"bias": True}], ids=str)
def test_options(options: dict[str, Any], tokens: int, device: str) -> None:
    check(layer(**options), tokens, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamped_gate(dtype: torch.dtype, device: str) -> None:
    made = layer(dtype, bias=True, activation=ClampedSwiglu(1.702, 0.5))  # a limit that many numbers pass
    check(made, 21, device, dtype=dtype)


def test_activations_without_a_kernel(device: str) -> None:
    made = layer(act="gelu")
    assert made.stack().gate is None
    check(made, 9, device)


@pytest.mark.parametrize(
    ("scheme", "tokens", "options"),
    [(scheme, tokens, {}) for scheme in ("static", "dynamic", "per_channel") for tokens in (1, 13)]
    + [
        (scheme, 6, options)
        for scheme in ("static", "dynamic")
        for options in ({"scale_inputs": True}, {"act": "gelu"})
    ],
)
def test_float8(scheme: str, tokens: int, options: dict[str, Any], device: str) -> None:
    """A number between the products may be rounded to the neighbouring float8 one: its step is an eighth."""
    if scheme == "per_channel":
        quantization = QuantConfig("FP8_PER_CHANNEL_PER_TOKEN")
    else:
        quantization = QuantConfig("FP8", activation_scheme=scheme)
    check(layer(torch.float32, quantization, **options), tokens, device, tile=TILES[tokens % 2], bound=5e-3)


def test_float8_in_half_precision(device: str) -> None:
    quantization = QuantConfig("FP8", activation_scheme="static")
    check(layer(torch.bfloat16, quantization), 13, device, dtype=torch.bfloat16, bound=0.05)


@pytest.mark.parametrize(("tokens", "kind"), [(5, "random"), (300, "random"), (70, "one_expert"), (70, "some_empty")])
@pytest.mark.parametrize("held", [range(6), range(2, 5)], ids=str)
def test_blocks_hold_each_assignment_once(held: range, tokens: int, kind: str, device: str) -> None:
    experts, _ = routing(tokens, kind)
    block_m, total = 16, tokens * TOP_K
    blocks = make_blocks(experts.to(device), held.start, len(held), block_m)
    assert blocks.count == most_blocks(total, len(held), block_m)
    rows, expert_of = blocks.rows.cpu().view(-1, block_m), blocks.expert_of.cpu()
    used = int((expert_of >= 0).sum())
    assert (expert_of[used:] == -1).all()
    found = []
    for expert in held:
        mine = rows[:used][expert_of[:used] == expert - held.start].flatten().tolist()
        inside = [row for row in mine if row < total]
        assert mine == inside + [total] * (-len(inside) % block_m), "only the end is padding"
        assert inside == (experts.flatten() == expert).nonzero().flatten().tolist()
        found += inside
    assert len(found) == int(((experts >= held.start) & (experts < held.stop)).sum())


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [16, 1, 0, 17], [0, 0, 64, 0], [33, 33, 33, 33], [15, 15, 15, 15]])
def test_there_are_blocks_for_any_routing(counts: list[int]) -> None:
    assert sum(-(-count // 16) for count in counts) <= most_blocks(sum(counts), 4, 16)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 512, 4096])
def test_default_tiles(tokens: int) -> None:
    for held, top_k in ((8, 2), (128, 8), (1, 1)):
        for dtype in (torch.float32, torch.bfloat16, FP8):
            tile = moe.default_tile(tokens, top_k, held, dtype)
            assert tile in (moe.FLOAT32_TILE, *(one for _, one in moe.TILES))
    few, many = (moe.default_tile(count, 8, 128, torch.bfloat16).block_m for count in (1, 4096))
    assert few < many


@PADDED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "one_expert", "some_empty"])
@pytest.mark.parametrize("tile", [SORTED, dataclasses.replace(SORTED, block_n=32, resident=0, flatten=False)], ids=str)
def test_sorted_rows(tile: moe.SortedTile, kind: str, dtype: torch.dtype, device: str) -> None:
    check(layer(dtype), 23, device, dtype=dtype, tile=tile, kind=kind)


@PADDED
@pytest.mark.parametrize("options", [{"scale_inputs": True}, {"bias": True}, {"act": "gelu"}, {"ep": (1, 3)}], ids=str)
def test_options_of_sorted_rows(options: dict[str, Any], device: str) -> None:
    check(layer(torch.bfloat16, **options), 19, device, dtype=torch.bfloat16, tile=SORTED)


@PADDED
def test_clamped_gate_of_sorted_rows(device: str) -> None:
    made = layer(torch.bfloat16, bias=True, activation=ClampedSwiglu(1.702, 0.5))
    check(made, 21, device, dtype=torch.bfloat16, tile=SORTED)


@PADDED
def test_plain_experts_of_sorted_rows(device: str) -> None:
    check(layer(torch.bfloat16, kind=PlainExperts, act="relu2"), 21, device, dtype=torch.bfloat16, tile=SORTED)


@PADDED
@pytest.mark.parametrize(
    ("scheme", "options"),
    [("static", {}), ("static", {"scale_inputs": True}), ("dynamic", {}), ("dynamic", {"act": "gelu"})],
)
def test_float8_of_sorted_rows(scheme: str, options: dict[str, Any], device: str) -> None:
    quantization = QuantConfig("FP8", activation_scheme=scheme)
    made = layer(torch.bfloat16, quantization, inner=ALIGNED, **options)
    assert moe.takes(torch.empty(1, H, dtype=torch.bfloat16), made.stack())
    check(made, 13, device, dtype=torch.bfloat16, tile=SORTED, bound=0.05)


@PADDED
def test_per_channel_float8_of_sorted_rows(device: str) -> None:
    made = layer(torch.bfloat16, QuantConfig("FP8_PER_CHANNEL_PER_TOKEN"), inner=ALIGNED)
    check(made, 13, device, dtype=torch.bfloat16, tile=SORTED, bound=0.05)


def test_what_sorted_rows_are_for() -> None:
    def allowed(x_dtype: torch.dtype, made: GatedExperts) -> bool:
        return moe.takes(torch.empty(1, H, dtype=x_dtype), made.stack())

    static = QuantConfig("FP8", activation_scheme="static")
    assert allowed(torch.bfloat16, layer(torch.bfloat16)) == (moe.is_interpreted() or has_wgmma())
    assert not allowed(torch.float32, layer(torch.float32))
    assert not allowed(torch.bfloat16, layer(torch.bfloat16, static)), "rows of 40 bytes"
    assert not allowed(torch.bfloat16, layer(torch.bfloat16, static, act="gelu", inner=ALIGNED))


def test_sorted_rows_that_cannot_be_are_computed_otherwise(device: str) -> None:
    check(layer(), 13, device, tile=SORTED)


def test_many_rows_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "LEAST_SORTED_ROWS", 8)
    monkeypatch.setattr("lamella_core.kernels.triton.moe_sorted.has_wgmma", lambda: True)

    def best(tokens: int, dtype: torch.dtype) -> moe.Tile | moe.SortedTile:
        return moe.best_tile(torch.empty(tokens, H, dtype=dtype), routing(tokens)[0], layer(dtype).stack())

    assert best(24, torch.bfloat16) == moe.SORTED_TILE
    assert isinstance(best(23, torch.bfloat16), moe.Tile) and best(24, torch.float32) == moe.FLOAT32_TILE
