"""RMS norm, gate, rotary embedding and KV cache write: native against torch, rows independent of each other."""

import pytest
import torch

from lamella_core.kernels.cpu import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 7), (70, 2048), (0, 32)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape, dtype, with_residual):
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    residual = random(*shape, dtype=dtype, seed=2) if with_residual else None
    y, total = ops.rms_norm(x, weight, 1e-5, residual)
    expected, expected_total = reference.rms_norm(x, weight, 1e-5, residual)
    torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
    assert torch.equal(total, expected_total)
    alone = [
        ops.rms_norm(x[i : i + 1], weight, 1e-5, None if residual is None else residual[i : i + 1])[0]
        for i in range(len(x))
    ]
    assert not alone or torch.equal(torch.cat(alone), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_with_unit_offset(dtype):
    """1 + weight is multiplied in float32, before the cast."""
    x, residual, weight = (random(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(5, 48), (5, 48), (48,)]))
    y, total = ops.rms_norm(x, weight, 1e-5, residual, unit_offset=True)
    wide = (x + residual).float()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + weight.float())
    torch.testing.assert_close(y, expected.to(dtype), **TOLERANCE[dtype])
    assert (y == expected.to(dtype)).float().mean() > 0.9 or dtype == torch.float32
    assert torch.equal(total, x + residual)
    assert torch.equal(reference.rms_norm(x, weight, 1e-5, residual, unit_offset=True)[1], total)


def test_rms_norm_leaves_its_inputs_alone_and_takes_mixed_dtypes():
    x, residual, weight = random(4, 32, dtype=torch.bfloat16), random(4, 32, dtype=torch.bfloat16, seed=1), random(32)
    before = x.clone(), residual.clone()
    y, _ = ops.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert y.dtype == torch.float32  # bfloat16 rows times a float32 weight, by torch's promotion


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (5, 14), (3, 2), (40, 2816), (0, 8)], ids=str)
def test_silu_and_mul(shape, dtype):
    gate_up = random(*shape, dtype=dtype) * 4
    y = ops.silu_and_mul(gate_up)
    torch.testing.assert_close(y, reference.silu_and_mul(gate_up), **TOLERANCE[dtype])
    alone = [ops.silu_and_mul(gate_up[i : i + 1]) for i in range(len(gate_up))]
    assert not alone or torch.equal(torch.cat(alone), y)


def test_silu_and_mul_at_extremes():
    gate = torch.tensor([[-1e4, -100.0, -88.0, -0.0, 88.0, 1e4, float("nan"), float("inf")]])
    y = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(y[0, :6], torch.tensor([0.0, 0.0, 0.0, 0.0, 88.0, 1e4]), rtol=1e-6, atol=1e-6)
    assert y[0, 6].isnan() and y[0, 7].isinf()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rotary_dim", [(64, 64), (64, 16), (80, 32), (128, 128), (6, 6)])
def test_rope_rotates_views_in_place(head_dim, rotary_dim, interleaved, dtype):
    tokens, q_heads, kv_heads = 9, 4, 2
    qkv = random(tokens, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = random(tokens, rotary_dim // 2, seed=1) * 3
    results = []
    for rope in (ops.rope_inplace, reference.rope_inplace):
        copy = qkv.clone()
        rope(copy[:, :q_heads], copy[:, q_heads:-kv_heads], angles.cos(), angles.sin(), rotary_dim, interleaved)
        results.append(copy)
    torch.testing.assert_close(*results, **TOLERANCE[dtype])
    assert torch.equal(results[0][:, -kv_heads:], qkv[:, -kv_heads:])
    assert torch.equal(results[0][..., rotary_dim:], qkv[..., rotary_dim:])
    exact = qkv.double()[:, 0]
    a, b = (exact[:, 0], exact[:, 1]) if interleaved else (exact[:, 0], exact[:, rotary_dim // 2])
    expected = a * angles[:, 0].double().cos() - b * angles[:, 0].double().sin()
    torch.testing.assert_close(results[0][:, 0, 0].double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_stores_where_the_slots_say(dtype):
    qkv = random(5, 4, 8, dtype=dtype)
    k, v = qkv[:, :2], qkv[:, 2:]
    slots = torch.tensor([7, -1, 0, 11, 4])
    k_cache, v_cache = torch.zeros(3, 2, 4, 8, dtype=dtype), torch.zeros(3, 2, 4, 8, dtype=dtype)
    ops.write_kv(k, v, k_cache, v_cache, slots)
    for cache, source in ((k_cache, k), (v_cache, v)):
        flat = cache.transpose(1, 2).reshape(12, 2, 8)
        for token, slot in enumerate(slots.tolist()):
            assert slot < 0 or torch.equal(flat[slot], source[token])
        untouched = [s for s in range(12) if s not in slots.tolist()]
        assert not flat[untouched].any()


def test_write_kv_refuses_a_slot_past_the_cache_and_writes_nothing():
    k = torch.ones(2, 1, 8)
    cache = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match="slot"):
        ops.write_kv(k, k, cache, cache.clone(), torch.tensor([0, 8]))
    assert not cache.any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-5), "differ"),
        (lambda: ops.rms_norm(torch.zeros(2, 8), torch.zeros(8), 1e-5, torch.zeros(3, 8)), "residual"),
        (lambda: ops.silu_and_mul(torch.zeros(2, 7)), "2I"),
        (
            lambda: ops.rope_inplace(
                torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), torch.zeros(2, 3), torch.zeros(2, 3), 8
            ),
            "cos",
        ),
        (
            lambda: ops.rope_inplace(
                torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), torch.zeros(2, 5), torch.zeros(2, 5), 10
            ),
            "rotary_dim=10",
        ),
        (
            lambda: ops.write_kv(
                torch.zeros(2, 1, 8),
                torch.zeros(2, 1, 8),
                torch.zeros(2, 2, 4, 8),
                torch.zeros(2, 2, 4, 8),
                torch.zeros(2, dtype=torch.int64),
            ),
            "does not fit",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
