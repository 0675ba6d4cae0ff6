"""Output projections that add the residual stream in their product: where they are asked to, and that nothing changes.

The kernel is a stand-in that serves sums of any number of rows on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.reference_context import ReferenceCache, ReferenceContext, forward_step, run_ranks
from tests.support.tiny_models import hf_dir

from lamella_core import QuantConfig
from lamella_core.auto import AutoModelForCausalLM
from lamella_core.context import SingleRank
from lamella_core.kernels import gpu_matmul, matmul
from lamella_core.kernels.fused import LEAST_ADDED_ROWS, AddAfter
from lamella_core.kernels.matmul import MatmulPlan
from lamella_core.layers import decoder
from lamella_core.layers.linear import Linear, RowParallelLinear, Stream
from lamella_core.layers.parameter import set_parameter
from lamella_core.mapping import Mapping
from lamella_core.models.llama import LlamaConfig

PROMPTS = {0: [5, 9, 3, 77], 1: [8, 30]}
PLAN = MatmulPlan("rows", ((None, "cublas"),))


class Kernel:
    """Serves sums, and counts them by the rows of each."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.declines = False

    def __call__(self, x: torch.Tensor, w: torch.Tensor, bias: Any, scales: Any, after: Any) -> torch.Tensor | None:
        if not isinstance(after, AddAfter):
            return None
        assert bias is None and after.summand.shape == (len(x), len(w))
        self.asked.append(len(x))
        factor = 1.0 if scales is None else scales.x * scales.w
        return None if self.declines else x.float() @ w.float().t() * factor + after.summand


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """In place of torch's products; sums are worth it from one row on."""
    made = Kernel()
    stand_in = gpu_matmul.GpuMatmul("cublas", gpu_matmul.FLOATS, gpu_matmul.cublas, fused=made, device="cpu")
    monkeypatch.setitem(matmul.KERNELS, "cublas", stand_in)
    monkeypatch.setattr(decoder, "LEAST_ADDED_ROWS", 1)
    return made


def model_of(architecture: str, variant: str, **kwargs: Any) -> Any:
    model = AutoModelForCausalLM.from_hugging_face(hf_dir(architecture, variant), **kwargs)
    for linear in model.modules():
        if isinstance(linear, Linear):
            linear.plan = PLAN
    return model


def logits_of(model: Any, tp: Any = None) -> torch.Tensor:
    """All tokens' logits of a step, and of one after it."""
    cache = ReferenceCache()
    steps = [forward_step(model, cache, PROMPTS, tp), forward_step(model, cache, {0: [4, 2], 1: [6]}, tp)]
    return torch.cat([found for step in steps for found in step.values()])


def separately(monkeypatch: pytest.MonkeyPatch, model: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "LEAST_ADDED_ROWS", LEAST_ADDED_ROWS)
        return logits_of(model)


@pytest.mark.parametrize(
    ("architecture", "variant", "sums"),
    [
        ("LlamaForCausalLM", "grouped", 2),
        ("Qwen2ForCausalLM", "full", 2),
        ("MixtralForCausalLM", "top2", 1),  # experts add nothing in their products
        ("Gemma2ForCausalLM", "window", 0),  # norms what its halves add
        ("GraniteForCausalLM", "multiplied", 0),  # multiplies what its halves add
        ("OPTForCausalLM", "norm_before", 0),  # has biases
        ("CohereForCausalLM", "tied", 0),  # halves side by side
    ],
)
def test_logits_stay(
    architecture: str, variant: str, sums: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(architecture, variant)
    expected = separately(monkeypatch, model)
    assert not kernel.asked
    assert torch.allclose(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert kernel.asked == [6] * (2 * sums) + [3] * (2 * sums)  # of two layers


def test_a_kernel_that_declines_changes_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("LlamaForCausalLM", "grouped")
    expected, kernel.declines = separately(monkeypatch, model), True
    assert torch.equal(logits_of(model), expected) and len(kernel.asked) == 8


def test_few_rows_are_not_asked_for(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "LEAST_ADDED_ROWS", 6)
    logits_of(model_of("LlamaForCausalLM", "grouped"))
    assert kernel.asked == [6] * 4


@pytest.mark.parametrize("rows", [[5, 1], []])
def test_selected_rows(rows: list[int], kernel: Kernel) -> None:
    model = model_of("LlamaForCausalLM", "grouped")
    ids, wanted = torch.tensor(PROMPTS[0] + PROMPTS[1]), torch.tensor(rows, dtype=torch.int64)
    positions = torch.tensor([0, 1, 2, 3, 0, 1])

    def hidden(*args: Any) -> torch.Tensor:
        return model(ids, positions, ReferenceContext(ReferenceCache(), [(0, 4), (1, 2)]), None, *args)

    with torch.no_grad():
        every = hidden()
        kernel.asked.clear()
        assert torch.allclose(hidden(wanted), every[wanted], atol=1e-5)
    assert kernel.asked == [6, 6, *[len(rows)] * (2 if rows else 0)]


def test_pipeline_stages_hand_on_the_sum(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = separately(monkeypatch, model_of("LlamaForCausalLM", "grouped"))
    stages = [model_of("LlamaForCausalLM", "grouped", mapping=Mapping(2, rank, pp_size=2)) for rank in range(2)]
    found = forward_step(stages[0], ReferenceCache(), PROMPTS, stages=stages[1:])
    assert torch.allclose(torch.cat(list(found.values())), expected[:6], atol=1e-5, rtol=1e-4)
    assert kernel.asked == [6] * 4


def test_several_ranks_sum_for_themselves(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = separately(monkeypatch, model_of("LlamaForCausalLM", "grouped"))

    def work(rank: int, tp: Any) -> torch.Tensor:
        return logits_of(model_of("LlamaForCausalLM", "grouped", mapping=Mapping(2, rank, tp_size=2)), tp)

    assert all(torch.allclose(found, expected, atol=1e-4, rtol=1e-3) for found in run_ranks(2, work))
    assert not kernel.asked


class Context:
    tp = SingleRank()


@pytest.mark.parametrize(("scheme", "is_served"), [("static", True), ("dynamic", False)])
def test_float8(scheme: str, is_served: bool, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales per token are not even made for the question."""
    stand_in = gpu_matmul.GpuMatmul("cublas_fp8", gpu_matmul.FP8, gpu_matmul.upcast_fp8, fused=kernel, device="cpu")
    monkeypatch.setitem(matmul.KERNELS, "cublas_fp8", stand_in)
    config = LlamaConfig(
        architecture="X", model_type="x", dtype="bfloat16", vocab_size=32, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=32,
        quantization=QuantConfig("FP8", activation_scheme=scheme),
    )  # fmt: skip
    linear = RowParallelLinear(48, 32, False, config=config, name="layers.0.mlp.down_proj")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(linear.named_parameters()):
        values = torch.rand(parameter.shape, generator=generator) + 0.5
        set_parameter(linear, name, values.to(parameter.dtype))
    linear.plan = MatmulPlan("rows", ((None, "cublas_fp8"),))
    x, summand = (torch.randn(3, size, generator=generator).bfloat16() for size in (48, 32))
    stream = Stream(summand)
    found, product = linear(x, Context(), stream), linear(x, Context())
    expected = product + summand if is_served else product
    assert torch.allclose(found.float(), expected.float(), rtol=2**-6, atol=0.5)
    assert kernel.asked == [3] * is_served and (stream.left is None) == is_served
