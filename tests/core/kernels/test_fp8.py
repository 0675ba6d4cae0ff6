"""Float8 on the CPU: rounding, scales and products."""

from __future__ import annotations

import pytest
import torch

from lamella_core.errors import ConfigError
from lamella_core.kernels import fp8
from lamella_core.kernels.matmul import KERNELS, MatmulPlan, Scales, candidate_plans, default_plan

FLOAT8 = torch.float8_e4m3fn


def every_float8() -> torch.Tensor:
    """Returns the 254 float8 numbers that are not NaN."""
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    return values[~values.float().isnan()]


def random8(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(60).to(FLOAT8)


def test_widening_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8).view(2, 128)
    assert torch.equal(fp8.widen(codes).nan_to_num(7.0), codes.float().nan_to_num(7.0))
    assert int(fp8.widen(codes).isnan().sum()) == 2


def test_float8_numbers_survive_quantization() -> None:
    values = every_float8()
    scale = torch.tensor(0.25)
    assert torch.equal(fp8.quantize(values.float()[None] * scale, scale)[0].float(), values.float())


def test_quantization_rounds_to_nearest_even_and_saturates() -> None:
    x = torch.tensor([[1.0625, 1.1875, 2.0**-10, 1.5 * 2.0**-9, 460.0, -1e30, float("inf"), float("nan")]])
    want = torch.tensor([1.0, 1.25, 0.0, 2.0**-8, 448.0, -448.0, 448.0])
    got = fp8.quantize(x, torch.tensor(1.0)).float()[0]
    assert torch.equal(got[:-1], want) and got[-1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_token_has_its_scale(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.5, -3.5, 1.0], [0.0, 0.0, 0.0], [100.0, 7.0, -200.0]], dtype=dtype)
    values, scales = fp8.quantize_per_token(x)
    assert values.dtype == FLOAT8 and scales.shape == (3, 1) and scales.dtype == torch.float32
    assert torch.allclose(scales[:, 0], torch.tensor([3.5 / 448, 0.0, 200.0 / 448]), atol=1e-12)
    assert torch.equal(values.float().abs().amax(-1), torch.tensor([448.0, 0.0, 448.0]))
    assert torch.allclose(values.float() * scales, x.float(), rtol=1 / 16)


def test_simulated_values_are_those_of_the_cache() -> None:
    x, scale = torch.randn(5, 2, 8), torch.tensor(0.01)
    kept = fp8.simulate(x, scale)
    assert torch.equal(kept, fp8.simulate(kept, scale)) and not torch.equal(kept, x)
    assert torch.allclose(kept, x, rtol=1 / 16, atol=0.01 * 2**-10)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_of_the_scaled_values(per_row: bool, out_dtype: torch.dtype) -> None:
    x, w, bias = random8(5, 48), random8(300, 48, seed=1), torch.randn(300).to(out_dtype)
    x_scale = torch.rand(5, 1) * 0.1 if per_row else torch.tensor(0.03)
    w_scale = torch.rand(300) * 0.1 if per_row else torch.tensor(0.02)
    got = KERNELS["fp8_upcast"](x, w, 300, bias, Scales(x_scale, w_scale, out_dtype))
    exact = (x.double() * x_scale) @ (w.double() * (w_scale[:, None] if per_row else w_scale)).T + bias.double()
    assert got.dtype == out_dtype
    bound = 1e-5 if out_dtype == torch.float32 else 8e-3
    assert (got.double() - exact).abs().max() < bound * exact.abs().max()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x, w = random8(9, 64), random8(40, 64, seed=1)
    scales = Scales(torch.tensor(0.1), torch.tensor(0.1), torch.float32)
    together = fp8.linear(x, w, None, scales)
    for row in range(9):
        assert torch.equal(fp8.linear(x[row : row + 1], w, None, scales)[0], together[row])


def test_float8_weights_have_a_plan() -> None:
    plan = MatmulPlan("rows", ((None, "fp8_upcast"),))
    for layout in ("rows", None):
        for strict in (True, False):
            assert default_plan(FLOAT8, 32, 16, batch_invariant=strict, layout=layout) == plan
    assert candidate_plans(FLOAT8, 32, 16, require_batch_invariant=True) == [plan]
    assert not plan.available(torch.float32, 32, 16)
    with pytest.raises(ConfigError, match="no matmul kernel reads layout 'panel16'"):
        default_plan(FLOAT8, 32, 16, batch_invariant=False, layout="panel16")


def test_operands_must_be_float8_with_scales() -> None:
    scales = Scales(torch.tensor(1.0), torch.tensor(1.0), torch.float32)
    with pytest.raises(ValueError, match="needs scales and float8 operands; x is torch.float32"):
        KERNELS["fp8_upcast"](torch.ones(1, 4), random8(2, 4), 2, None, scales)
    with pytest.raises(ValueError, match="needs scales"):
        KERNELS["fp8_upcast"](random8(1, 4), random8(2, 4), 2, None)
