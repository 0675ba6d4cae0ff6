"""Products of native and torch kernels against float64, and the bitwise independence of float32 rows."""

from functools import partial

import pytest
import torch

from lamella_core.errors import ConfigError
from lamella_core.kernels import matmul
from lamella_core.kernels.cpu import ops, reference
from lamella_core.kernels.cpu.build import native_status

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}  # relative to the largest output
# M, N, K: ragged panels, odd and tiny K, K around block edges, M around row-block and cache-block edges
SHAPES = [
    (0, 5, 6),
    (1, 37, 301),
    (2, 16, 1),
    (3, 1, 17),
    (5, 48, 512),
    (7, 33, 257),
    (13, 100, 255),
    (45, 129, 600),
    (200, 31, 300),
]


def operands(m, n, k, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=g).to(dtype) for shape in ((m, k), (n, k), (n,)))


def relative_error(y, x, w, bias=None):
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    return 0.0 if exact.numel() == 0 else ((y.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(matmul.KERNELS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_float64(name, shape, dtype):
    kernel = matmul.KERNELS[name]
    m, n, k = shape
    if not kernel.available(dtype, n, k):
        pytest.skip(f"{name} does not serve {dtype} here")
    x, w, bias = operands(m, n, k, dtype)
    stored = matmul.to_layout(w, kernel.layout)
    for b in (None, bias):
        y = kernel(x, stored, n, b)
        assert y.shape == (m, n) and y.dtype == dtype
        assert relative_error(y, x, w, b) < BOUNDS[dtype]


@pytest.mark.parametrize("name", [k.name for k in matmul.KERNELS.values() if k.batch_invariant])
@pytest.mark.parametrize("shape", [(45, 129, 600), (17, 96, 2049), (210, 40, 64)], ids=str)
def test_float32_row_has_the_same_bits_in_any_company(name, shape):
    kernel = matmul.KERNELS[name]
    m, n, k = shape
    if not kernel.available(torch.float32, n, k):
        pytest.skip(f"{name} is not available here")
    x, w, bias = operands(m, n, k, torch.float32)
    stored = matmul.to_layout(w, kernel.layout)
    whole = kernel(x, stored, n, bias)
    threads = torch.get_num_threads()
    # The fallbacks give torch products of one shape; what its libraries do with the rows of a product is theirs.
    same = torch.equal if kernel.needs_native else partial(torch.allclose, rtol=1e-5, atol=1e-4)
    try:
        torch.set_num_threads(1)
        assert same(kernel(x, stored, n, bias), whole)
        torch.set_num_threads(2)
        for start, stop in ((0, 1), (m - 1, m), (3, 5), (1, 8), (2, 15), (0, m - 1), (5, m)):
            assert same(kernel(x[start:stop], stored, n, bias), whole[start:stop])
        order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
        assert same(kernel(x[order].contiguous(), stored, n, bias), whole[order])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not native_status().available, reason="needs a compiler")
@pytest.mark.parametrize("m", [1, 3, 8, 30])
def test_native_kernels_read_strided_rows_and_write_wide_results(m):
    x, w, bias = operands(m, 50, 128, torch.bfloat16)
    padded = torch.cat([x, x], dim=1)[:, :128]
    y = ops.matmul_panels(padded, ops.pack_panels(w), 50, bias, out_dtype=torch.float32)
    assert y.dtype == torch.float32 and relative_error(y, x, w, bias) < 1e-6
    y = ops.matmul_panels(padded, ops.pack_panels(w), 50, bias.float(), out_dtype=torch.float32)
    assert relative_error(y, x, w, bias) < 1e-6
    assert torch.equal(ops.gemv_rows(padded, w, bias), ops.gemv_rows(x, w, bias))


def test_special_values_reach_the_result():
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    w = torch.ones(16, 32)
    for kernel in matmul.KERNELS.values():
        if kernel.available(torch.float32, 16, 32):
            y = kernel(x, matmul.to_layout(w, kernel.layout), 16, None)
            assert y[0].isnan().all() and y[1].isinf().all()
    if native_status().available:
        big = ops.matmul_panels(
            torch.full((1, 4), 3e38), ops.pack_panels(torch.full((16, 4), 1.0)), 16, out_dtype=torch.bfloat16
        )
        nan = ops.matmul_panels(x[:1], ops.pack_panels(w), 16, out_dtype=torch.float16)
        assert big.isinf().all() and nan.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 64])
def test_panels_hold_the_weight(n, dtype):
    w = torch.randn(n, 9).to(dtype)
    packed = ops.pack_panels(w)
    assert packed.shape == (-(-n // 16), 9, 16) and packed.is_contiguous()
    assert torch.equal(ops.unpack_panels(packed, n), w)
    ids = torch.tensor([n - 1, 0, n // 2])
    assert torch.equal(ops.panel_rows(packed, ids), w[ids])
    assert torch.equal(packed[-1, :, (n - 1) % 16 + 1 :], torch.zeros(9, 15 - (n - 1) % 16, dtype=dtype))
    assert torch.equal(matmul.from_layout(matmul.to_layout(w, "panel16"), "panel16", n), w)


def test_reference_has_the_meaning_of_the_native_product():
    x, w, bias = operands(20, 50, 128, torch.bfloat16)
    ours, theirs = (f(x, ops.pack_panels(w), 50, bias) for f in (ops.matmul_panels, reference.matmul_panels))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, p: ops.matmul_panels(x[:, :5], p, 20), r"needs \[M, 8\]"),
        (lambda x, p: ops.matmul_panels(x.double(), p, 20), "cast x"),
        (lambda x, p: ops.matmul_panels(x, p, 40), "n=40"),
        (lambda x, p: ops.matmul_panels(x, p, 16), "n=16"),
        (lambda x, p: ops.matmul_panels(x, p.transpose(0, 1), 20), "panels|not contiguous"),
        (lambda x, p: ops.matmul_panels(x, p[0], 20), "not panel16"),
        (lambda x, p: ops.matmul_panels(x, p, 20, torch.zeros(19)), "bias"),
        (lambda x, p: ops.gemv_rows(x, p), r"not \[N, K\]"),
        (lambda x, p: ops.gemv_rows(x.to(torch.int32), torch.zeros(3, 8, dtype=torch.int32)), "needs one of"),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 8), ops.pack_panels(torch.zeros(20, 8)))


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_run_and_survive_json(dtype):
    x, w, bias = operands(20, 40, 64, dtype)
    plans = matmul.candidate_plans(dtype, 40, 64, require_batch_invariant=False)
    assert plans and len(set(plans)) == len(plans)
    for plan in plans:
        assert matmul.MatmulPlan.from_dict(plan.to_dict()) == plan
        for rows in (1, 20):
            y = plan.run(x[:rows], matmul.to_layout(w, plan.layout), 40, bias)
            assert relative_error(y, x[:rows], w, bias) < BOUNDS[dtype]


def test_float32_gets_only_batch_invariant_plans():
    for plan in matmul.candidate_plans(torch.float32, 40, 64, require_batch_invariant=False):
        assert plan.batch_invariant and len(plan.steps) == 1
    for layout in (None, "rows", "panel16"):
        plan = matmul.default_plan(torch.float32, 40, 64, batch_invariant=False, layout=layout)
        assert plan.batch_invariant and layout in (None, plan.layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [None, "rows", "panel16"])
def test_default_plan_respects_the_layout(layout, dtype):
    plan = matmul.default_plan(dtype, 40, 64, batch_invariant=False, layout=layout)
    assert layout in (None, plan.layout) and plan.available(dtype, 40, 64)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"layout": "panel61", "steps": [[None, "native_panels"]]}, "did you mean 'panel16'"),
        ({"layout": "panel16", "steps": [[None, "native_panel"]]}, "did you mean 'native_panels'"),
        ({"layout": "panel16", "steps": [[None, "torch_rows"]]}, "reads layout 'rows'"),
        ({"layout": "rows", "steps": []}, "row limits"),
        ({"layout": "rows", "steps": [[4, "torch_rows"]]}, "None last"),
        ({"layout": "rows", "steps": [[4, "torch_rows"], [2, "torch_rows"], [None, "torch_rows"]]}, "rising"),
        ({"layout": "rows", "steps": [["4", "torch_rows"], [None, "torch_rows"]]}, "whole numbers"),
        ({"layout": "rows", "steps": [["torch_rows"]]}, "pair"),
        ({"layout": "rows", "steps": "torch_rows"}, "list of pairs"),
        ({"layout": "rows"}, "exactly the keys"),
        ({"layout": "rows", "steps": [[None, "torch_rows"]], "extra": 1}, "exactly the keys"),
        (["rows"], "exactly the keys"),
    ],
)
def test_malformed_plans_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        matmul.MatmulPlan.from_dict(data)


def test_registry_is_open_and_names_are_unique(monkeypatch):
    monkeypatch.setattr(matmul, "KERNELS", dict(matmul.KERNELS))
    monkeypatch.setattr(matmul, "LAYOUTS", dict(matmul.LAYOUTS))
    matmul.register_layout(matmul.Layout("columns", lambda w: w.t().contiguous(), lambda w, n: w.t()[:n].contiguous()))
    kernel = matmul.CpuMatmul("by_columns", "columns", False, (torch.float32,), False, lambda x, w, n, bias: x @ w)
    matmul.register_kernel(kernel)
    x, w, _ = operands(3, 4, 5, torch.float32)
    plan = matmul.MatmulPlan.from_dict({"layout": "columns", "steps": [[None, "by_columns"]]})
    torch.testing.assert_close(plan.run(x, matmul.to_layout(w, "columns"), 4), x @ w.T)
    with pytest.raises(ConfigError, match="registered already"):
        matmul.register_kernel(kernel)
    with pytest.raises(ConfigError, match="unknown layout 'diagonal'"):
        matmul.to_layout(w, "diagonal")


def test_fingerprint_is_plain_data():
    fingerprint = matmul.cpu_fingerprint()
    assert fingerprint == matmul.cpu_fingerprint()
    assert {"machine", "model", "flags", "threads", "native", "torch"} == set(fingerprint)
    assert all(isinstance(value, (str, int)) for value in fingerprint.values())
    assert bool(fingerprint["native"]) == native_status().available
