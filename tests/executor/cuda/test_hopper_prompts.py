"""Which prompts go to the kernel for Hopper, and over which keys; a reference stands in for the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.attention_steps import make_layer, make_queries, make_step
from tests.support.prompt_reference import attended

pytest.importorskip("triton", reason="GPU kernels need triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here: tests/gpu runs them", allow_module_level=True)

from tests.support.triton_interpreter import repair_interpreter

from lamella_core.kernels.cuda.prompt_attention import BegunKeys
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_executor.attention import hopper_prompts
from lamella_executor.attention.backend import AttentionStep, LayerCall
from lamella_executor.attention.hopper_prompts import BegunMemory, HopperPrompts
from lamella_executor.attention.paged_cpu import LayerWindow
from lamella_executor.attention.torch_backend import TorchAttention
from lamella_executor.attention.triton_backend import TritonAttention

repair_interpreter()

FLOAT8 = torch.float8_e4m3fn
KEYS = 100  # that there is room for
BOUND = 2e-2
# contexts and queries of all sequences; how many of those that do not decode are begun
STEPS = {
    "whole": ([9, 6, 12], [1, 6, 12], 0),
    "begun": ([20, 37], [4, 12], 2),
    "both": ([9, 3, 20, 6, 12], [1, 1, 4, 6, 12], 1),
    "whole before begun": ([6, 20], [6, 5], 2),
}


class Kernel:
    """In place of `prompt_attention`."""

    def __init__(self) -> None:
        self.calls: list[BegunKeys | None] = []
        self.is_there = True

    def serves(self, q: torch.Tensor, num_kv_heads: int, quantizes: bool = False) -> bool:
        return self.is_there

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_start: torch.Tensor, *,
        out_scale: torch.Tensor | None, out: torch.Tensor | None, **keywords: Any,
    ) -> torch.Tensor:  # fmt: skip
        self.calls.append(keywords["begun"])
        result = attended(q, k, v, query_start, **keywords)
        out = torch.empty_like(q) if out is None else out
        return out.copy_(result if out_scale is None else result / out_scale)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """For prompts of four tokens or more."""
    kernel = Kernel()
    monkeypatch.setattr(hopper_prompts, "prompt_attention", kernel)
    monkeypatch.setattr(hopper_prompts, "serves", kernel.serves)
    monkeypatch.setattr(hopper_prompts, "LEAST_PROMPT", 4)
    monkeypatch.setattr(hopper_prompts, "BEGUN_BYTES", KEYS * 2 * 2 * 64 * 2)
    return kernel


def prompts(step: AttentionStep, layer: LayerCall) -> tuple[torch.Tensor, LayerCall]:
    """Returns queries, and the layer with keys and values of their own: views of a fused projection."""
    q = make_queries(step, layer)[step.num_decode :]
    own = torch.randn(len(q), 4, 64, generator=torch.Generator().manual_seed(2)).bfloat16().split(2, dim=1)
    return q, replace(layer, own=own)


def float8_layer(**changes: Any) -> LayerCall:
    return make_layer("cpu", cache_dtype=FLOAT8, kv_scales=torch.tensor([0.5, 1.25]), **changes)


def asked(step: AttentionStep, layer: LayerCall, has_own: bool = True) -> torch.Tensor | None:
    q, with_own = prompts(step, layer)
    return HopperPrompts(step, BegunMemory()).prefill(q, with_own if has_own else layer, None)


@pytest.mark.parametrize("is_float8", [False, True], ids=["bf16", "float8"])
@pytest.mark.parametrize("name", STEPS)
def test_prompts_over_their_own_keys_or_gathered_ones(name: str, is_float8: bool, kernel: Kernel):
    contexts, queries, num_begun = STEPS[name]
    step = make_step("cpu", contexts, queries)
    q, layer = prompts(step, float8_layer() if is_float8 else make_layer("cpu"))
    out = torch.full_like(q, 7.0).contiguous()
    result = HopperPrompts(step, BegunMemory()).prefill(q, layer, out)
    assert result is out
    torch.testing.assert_close(out, TorchAttention().begin(step).prefill(q, layer), atol=BOUND, rtol=BOUND)
    (begun,) = kernel.calls
    if num_begun == 0:
        assert begun is None
    else:
        assert begun is not None and begun.scales is layer.kv_scales
        assert begun.lengths.tolist() == contexts[step.num_decode :][:num_begun]


@pytest.mark.parametrize("name", STEPS)
def test_triton_attention_asks_it_first(name: str, kernel: Kernel):
    contexts, queries, _ = STEPS[name]
    step = make_step("cpu", contexts, queries)
    q, layer = prompts(step, float8_layer())
    expected = TorchAttention().begin(step).prefill(q, layer)
    backend = TritonAttention()
    torch.testing.assert_close(backend.begin(step).prefill(q, layer), expected, atol=BOUND, rtol=BOUND)
    assert len(kernel.calls) == 1
    kernel.is_there = False
    torch.testing.assert_close(backend.begin(step).prefill(q, layer), expected, atol=BOUND, rtol=BOUND)
    assert len(kernel.calls) == 1


def test_without_the_kernel_keys_of_the_dtype_of_products_come_from_the_cache(kernel: Kernel):
    kernel.is_there = False
    step, layer = make_step("cpu", [6, 12], [6, 12]), make_layer("cpu")
    q, layer = prompts(step, layer)
    assert layer.own is not None
    layer = replace(layer, own=tuple(torch.full_like(x, torch.nan) for x in layer.own))
    expected = TorchAttention().begin(step).prefill(q, replace(layer, own=None))
    torch.testing.assert_close(TritonAttention().begin(step).prefill(q, layer), expected, atol=BOUND, rtol=BOUND)


def test_float8_results(kernel: Kernel):
    step = make_step("cpu", [9, 20, 12], [1, 4, 12])
    q, layer = prompts(step, float8_layer(out_scale=torch.tensor(0.02)))
    out = torch.empty(q.shape, dtype=FLOAT8)
    assert TritonAttention().begin(step).prefill(q, layer, out) is out and len(kernel.calls) == 1
    expected = TorchAttention().begin(step).prefill(q, layer).float()
    torch.testing.assert_close(out.float() * 0.02, expected, atol=0.05, rtol=0.07)  # half a step of float8 is 1/16


@pytest.mark.parametrize(
    "change",
    [
        {"window": LayerWindow(8)},
        {"window": LayerWindow(8, 2)},
        {"softcap": 30.0},
        {"sparsity": BlockSparsity(8, 1, 2, 1)},
        {"alibi_slopes": torch.linspace(0.1, 0.8, 8)},
        {"sink_logits": torch.zeros(8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_layers_that_do_more_are_left(change: dict[str, Any], kernel: Kernel):
    step, layer = make_step("cpu", [20, 12], [4, 12]), make_layer("cpu", **change)
    assert not layer.is_plain and asked(step, layer) is None and not kernel.calls


def test_latent_caches_are_left(kernel: Kernel):
    step, layer = make_step("cpu", [20, 12], [4, 12]), make_layer("cpu", num_kv_heads=1)
    layer = replace(layer, spec=replace(layer.spec, value_dim=32))
    q = make_queries(step, layer)
    assert not layer.is_plain and HopperPrompts(step, BegunMemory()).prefill(q, layer, None) is None


@pytest.mark.parametrize(
    ("contexts", "queries", "is_served"),
    [
        ([20, 3, 2], [3, 3, 2], False),  # short ones
        ([20, 4, 2], [3, 4, 2], True),  # with one that is not
        ([9, 9], [1, 1], False),  # nothing but decoding
        ([60, KEYS - 60, 50], [5, 6, 50], True),  # as many keys as there is room for
        ([60, KEYS - 59, 50], [5, 6, 50], False),
    ],
)
def test_long_prompts_are_served_if_gathered_keys_have_room(
    contexts: Sequence[int], queries: Sequence[int], is_served: bool, kernel: Kernel
):
    step = make_step("cpu", contexts, queries)
    assert (asked(step, make_layer("cpu")) is not None) == is_served == bool(kernel.calls)


def test_steps_that_it_is_not_for(kernel: Kernel):
    layer = make_layer("cpu")
    assert asked(make_step("cpu", [20, 12], [4, 12], prefixes=[7, 0]), layer) is None
    assert asked(make_step("cpu", [20, 12], [4, 12], is_captured=True), layer) is None
    assert asked(make_step("cpu", [20, 12], [4, 12]), layer, has_own=False) is None
    assert not kernel.calls
    assert asked(make_step("cpu", [20, 30], [4, 12]), layer, has_own=False) is not None  # all of them begun
    kernel.is_there = False
    assert asked(make_step("cpu", [20, 12], [4, 12]), layer) is None and len(kernel.calls) == 1


def test_layers_and_steps_share_memory(kernel: Kernel):
    memory, device = BegunMemory(), torch.device("cpu")
    first = memory.get(2, 64, torch.bfloat16, device)
    assert [x.shape for x in first] == [(KEYS, 2, 64)] * 2
    assert memory.get(2, 64, torch.bfloat16, device) is first
    assert memory.get(1, 64, torch.bfloat16, device)[0].shape == (2 * KEYS, 1, 64)
    backend, step = TritonAttention(), make_step("cpu", [20, 12], [4, 12])
    for index in range(2):
        q, layer = prompts(step, make_layer("cpu", layer_idx=index))
        backend.begin(step).prefill(q, layer)
    assert all(call is not None for call in kernel.calls) and len({id(call.k) for call in kernel.calls if call}) == 1


@pytest.mark.parametrize(
    ("context", "queries", "leads"), [([9, 12], [1, 12], True), ([KEYS + 1], [8], False), ([3], [3], False)]
)
def test_a_step_leads_where_it_is_served(context: list[int], queries: list[int], leads: bool, kernel: Kernel):
    step, layer = make_step("cpu", context, queries), make_layer("cpu")
    q = make_queries(step, layer)[step.num_decode :]
    if step.num_whole:
        layer = replace(layer, own=(q[:, :2], q[:, :2]))
    assert TritonAttention().begin(step).leads_prefill(q, layer) is leads
    assert not kernel.calls
