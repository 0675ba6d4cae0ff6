"""Which calls FlashInfer serves, what it is told, and who serves the rest; with a stand-in for FlashInfer."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

import pytest
import torch
from tests.support import fake_flashinfer
from tests.support.attention_steps import make_layer, make_queries, make_step
from tests.support.fake_flashinfer import FakeFlashInfer
from torch import Tensor

from lamella_core.errors import ConfigError
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_executor.attention import flashinfer_backend
from lamella_executor.attention.backend import AttentionStep, LayerCall
from lamella_executor.attention.flashinfer_backend import FlashInferAttention
from lamella_executor.attention.paged_cpu import LayerWindow
from lamella_executor.attention.torch_backend import TorchAttention

FLOAT8 = torch.float8_e4m3fn
BOUND = 2e-2  # bfloat16 results of two orders of summation


class Recorder:
    """A fallback that notes what reaches it, and answers as `TorchAttention` does."""

    name = "recorder"
    is_capturable = True

    def __init__(self) -> None:
        self.calls: list[tuple[str, LayerCall]] = []
        self.leads = False

    def begin(self, step: AttentionStep) -> Recorder:
        self._inner = None if step.is_captured else TorchAttention().begin(step)
        return self

    def decode(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        self.calls.append(("decode", layer))
        return q.clone() if self._inner is None else self._inner.decode(q, layer)

    def leads_prefill(self, q: Tensor, layer: LayerCall) -> bool:
        return self.leads and layer.is_plain

    def prefill(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        self.calls.append(("prefill", layer))
        return q.clone() if self._inner is None else self._inner.prefill(q, layer)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    monkeypatch.setattr(flashinfer_backend, "_capability", lambda device: (9, 0))
    return fake_flashinfer.install(monkeypatch)


@pytest.fixture
def fallback() -> Recorder:
    return Recorder()


@pytest.fixture
def backend(library: FakeFlashInfer, fallback: Recorder) -> FlashInferAttention:
    return FlashInferAttention(fallback, "cpu")


def compare(backend: FlashInferAttention, step: AttentionStep, layer: LayerCall) -> None:
    """Both parts of the step, where it has them, against `TorchAttention`."""
    q = make_queries(step, layer)
    ours, theirs = backend.begin(step), TorchAttention().begin(step)
    first, last = q[: step.num_decode], q[step.num_decode :]
    if len(first):
        torch.testing.assert_close(ours.decode(first, layer), theirs.decode(first, layer), atol=BOUND, rtol=BOUND)
    if len(last):
        torch.testing.assert_close(ours.prefill(last, layer), theirs.prefill(last, layer), atol=BOUND, rtol=BOUND)


@pytest.mark.parametrize("window", [LayerWindow(), LayerWindow(7), LayerWindow(0, 2)])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FLOAT8])
def test_decode_and_prompts_agree_with_plain_attention(
    backend: FlashInferAttention, fallback: Recorder, window: LayerWindow, cache_dtype: torch.dtype
) -> None:
    step = make_step("cpu", [1, 16, 37, 20, 16, 33], [1, 1, 1, 5, 16, 2])
    scales = torch.tensor([0.5, 1.25]) if cache_dtype == FLOAT8 else None
    layer = make_layer(
        "cpu", cache_dtype=cache_dtype, window=window, scale=0.2, kv_scales=scales
    )  # fmt: skip
    compare(backend, step, layer)
    assert not fallback.calls


def test_kernels_are_told_the_scales_of_keys_and_values(backend: FlashInferAttention, library: FakeFlashInfer) -> None:
    step = make_step("cpu", [5, 9], [1, 1])
    layer = make_layer("cpu", cache_dtype=FLOAT8, scale=0.125, kv_scales=torch.tensor([0.5, 2.0]))
    backend.begin(step).decode(make_queries(step, layer), layer)
    assert library.decoded[0]["kv_scale"] == 2.0
    assert library.decoded[0]["q_scale"] == pytest.approx(0.125 * 64**0.5 * 0.5 / 2.0)


def test_block_tables_are_gathered_once_per_step(backend: FlashInferAttention, library: FakeFlashInfer) -> None:
    step = make_step("cpu", [5, 40, 3], [1, 1, 1])
    begun = backend.begin(step)
    for index in range(3):
        layer = make_layer("cpu", layer_idx=index)
        begun.decode(make_queries(step, layer), layer)
    tables = [call["pages"] for call in library.decoded]
    assert tables[0] is tables[1] is tables[2]
    assert tables[0].shape == (3, 3), "as wide as the longest context needs"
    assert len(library.loaded) == 1


def test_blocks_behind_a_window_are_not_read_as_negative(backend: FlashInferAttention, library: FakeFlashInfer) -> None:
    step = make_step("cpu", [40, 37], [1, 3])
    step.block_tables[:, 0] = -1  # 16 tokens that a window of 8 cannot see
    layer = make_layer("cpu", window=LayerWindow(8))
    compare(backend, step, layer)
    assert bool((library.decoded[0]["pages"] >= 0).all())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 30.0}, "soft-capped"),
        ({"alibi_slopes": torch.linspace(0.1, 0.8, 8)}, "ALiBi"),
        ({"sink_logits": torch.zeros(8)}, "sink logits"),
        ({"window": LayerWindow(4, 2)}, "sink tokens"),
        ({"sparsity": BlockSparsity(8, 1, 2, 1)}, "block-sparse"),
        ({"head_dim": 96}, "head_dim 96"),
        ({"dtype": torch.float32}, "float32"),
    ],
)
def test_what_is_not_served_goes_to_the_fallback_and_is_said_once(
    backend: FlashInferAttention,
    library: FakeFlashInfer,
    fallback: Recorder,
    caplog: pytest.LogCaptureFixture,
    change: dict,
    reason: str,
) -> None:
    step = make_step("cpu", [9, 20], [1, 4])
    q_dtype = change.get("dtype", torch.bfloat16)
    with caplog.at_level(logging.INFO):
        for index in range(2):
            layer = make_layer("cpu", layer_idx=index, **change)
            q = make_queries(step, layer, q_dtype)
            begun = backend.begin(step)
            begun.decode(q[:1], layer)
            begun.prefill(q[1:], layer)
    assert [phase for phase, _ in fallback.calls] == ["decode", "prefill"] * 2
    assert not library.decoded and not library.planned
    assert sum(reason in record.message for record in caplog.records) == 1


def test_prompts_with_prefixes_go_to_the_fallback(backend: FlashInferAttention, fallback: Recorder) -> None:
    compare(backend, make_step("cpu", [9, 20], [1, 20], prefixes=[7, 12]), make_layer("cpu"))
    assert [phase for phase, _ in fallback.calls] == ["prefill"]


def test_a_device_that_xqa_is_not_for_decodes_elsewhere(
    library: FakeFlashInfer, fallback: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer_backend, "_capability", lambda device: (8, 0))
    backend = FlashInferAttention(fallback, "cpu")
    compare(backend, make_step("cpu", [9, 20], [1, 4]), make_layer("cpu"))
    assert [phase for phase, _ in fallback.calls] == ["decode"]
    assert backend.prefiller is not None
    assert backend.prefiller.kernel_for(torch.bfloat16, torch.bfloat16) == "fa2"


@pytest.mark.parametrize(("cache_dtype", "kernel"), [(torch.bfloat16, "fa3"), (FLOAT8, "fa2")])
def test_the_prompt_kernel_follows_the_cache(
    backend: FlashInferAttention, cache_dtype: torch.dtype, kernel: str
) -> None:
    assert backend.prefiller is not None
    assert backend.prefiller.kernel_for(torch.bfloat16, cache_dtype) == kernel


def test_kernels_that_cannot_be_compiled_are_replaced_for_good(
    backend: FlashInferAttention, library: FakeFlashInfer, fallback: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    library.failure = RuntimeError("Ninja build failed. " + "noise " * 1000 + "curand_kernel.h: No such file")
    step, layer = make_step("cpu", [9, 20], [1, 4]), make_layer("cpu")
    compare(backend, step, layer)
    library.failure = None
    compare(backend, step, layer)
    assert [phase for phase, _ in fallback.calls] == ["decode", "prefill"] * 2
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2 and all("curand_kernel.h" in message and len(message) < 3000 for message in warnings)


def test_a_capture_uses_only_kernels_that_are_loaded(
    backend: FlashInferAttention, library: FakeFlashInfer, fallback: Recorder
) -> None:
    layer = make_layer("cpu")
    captured, eager = (make_step("cpu", [9, 20], [1, 1], is_captured=flag) for flag in (True, False))
    q = make_queries(captured, layer)
    backend.begin(captured).decode(q, layer)
    assert len(fallback.calls) == 1 and not library.loaded
    expected = backend.begin(eager).decode(q, layer)
    torch.testing.assert_close(backend.begin(captured).decode(q, layer), expected)
    assert len(fallback.calls) == 1 and len(library.decoded) == 2


def test_scales_first_seen_in_a_capture_stay_on_the_device(
    backend: FlashInferAttention, library: FakeFlashInfer
) -> None:
    plain = make_layer("cpu", cache_dtype=FLOAT8)
    captured, eager = (make_step("cpu", [9, 20], [1, 1], is_captured=flag) for flag in (True, False))
    q = make_queries(captured, plain)
    backend.begin(eager).decode(q, plain)  # loads the kernels
    layer = replace(plain, kv_scales=torch.tensor([0.5, 2.0]), out_scale=torch.tensor(0.1))
    out = backend.begin(captured).decode(q, layer)
    assert isinstance(library.decoded[-1]["q_scale"], Tensor) and isinstance(library.decoded[-1]["kv_scale"], Tensor)
    assert out.dtype == torch.bfloat16, "the output's scale must be known to the host"
    expected = TorchAttention().begin(eager).decode(q, layer)
    torch.testing.assert_close(out, expected, atol=BOUND, rtol=BOUND)


def test_float8_results_where_both_halves_of_a_step_can_give_them(
    backend: FlashInferAttention, library: FakeFlashInfer, fallback: Recorder
) -> None:
    scale = torch.tensor(0.02)
    layer = make_layer("cpu", cache_dtype=FLOAT8, out_scale=scale)
    decoding, mixed = make_step("cpu", [9, 20], [1, 1]), make_step("cpu", [9, 20], [1, 4])
    q = make_queries(mixed, layer)
    out = backend.begin(decoding).decode(q[:2], layer)
    assert out.dtype == FLOAT8
    expected = TorchAttention().begin(decoding).decode(q[:2], layer).float()
    torch.testing.assert_close(out.float() * scale, expected, atol=0.05, rtol=0.07)  # half a step of float8 is 1/16
    begun = backend.begin(mixed)
    assert begun.decode(q[:1], layer).dtype == begun.prefill(q[1:], layer).dtype == torch.bfloat16
    unquantized = make_layer("cpu", layer_idx=1, out_scale=scale)
    assert backend.begin(decoding).decode(q[:2], unquantized).dtype == torch.bfloat16
    assert not fallback.calls


def test_layers_share_a_plan_and_steps_share_wrappers(backend: FlashInferAttention, library: FakeFlashInfer) -> None:
    layers = [make_layer("cpu", layer_idx=i) for i in range(3)]
    layers.append(make_layer("cpu", layer_idx=3, window=LayerWindow(4)))
    for contexts in ([20, 9], [30, 40], [16, 17], [50, 3], [8, 8]):
        step = make_step("cpu", contexts, [4, 3])
        begun = backend.begin(step)
        for layer in layers:
            begun.prefill(make_queries(step, layer), layer)
    assert len(library.planned) == 5 * 2, "one for the layers with a window, one for the others"
    assert len(library.wrappers) == 2 * 2, "a plan may still be read when the next is made"


def test_a_missing_flashinfer_names_the_extra(monkeypatch: pytest.MonkeyPatch, fallback: Recorder) -> None:
    monkeypatch.setattr(flashinfer_backend, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'lamella\[cuda\]'"):
        FlashInferAttention(fallback, "cpu")


def test_a_broken_flashinfer_is_an_error_that_says_how(monkeypatch: pytest.MonkeyPatch, fallback: Recorder) -> None:
    fake_flashinfer.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(flashinfer_backend, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="cannot be imported"):
        FlashInferAttention(fallback, "cpu")


def test_unknown_kernels_and_unwanted_phases(library: FakeFlashInfer, fallback: Recorder) -> None:
    with pytest.raises(ConfigError, match="prefill_kernel is 'fa4'; allowed: auto, fa2, fa3"):
        FlashInferAttention(fallback, "cpu", prefill_kernel="fa4")
    backend = FlashInferAttention(fallback, "cpu", decode=False)
    compare(backend, make_step("cpu", [9, 20], [1, 4]), make_layer("cpu"))
    assert [phase for phase, _ in fallback.calls] == ["decode"] and library.planned


def test_only_long_prompts_without_float8(library: FakeFlashInfer, fallback: Recorder) -> None:
    """What "auto" makes of it; float8 results stay what they are in both halves of a step."""
    backend = FlashInferAttention(fallback, "cpu", decode=False, least_prompt=8)
    plain, float8 = make_layer("cpu"), make_layer("cpu", layer_idx=1, cache_dtype=FLOAT8)
    compare(backend, make_step("cpu", [9, 20, 12], [1, 7, 8]), plain)
    compare(backend, make_step("cpu", [9, 20], [1, 8]), float8)
    assert [phase for phase, _ in fallback.calls] == ["decode", "prefill"] * 2 and not library.planned
    step, scaled = make_step("cpu", [9, 20], [1, 8]), replace(plain, out_scale=torch.tensor(0.1))
    begun, q = backend.begin(step), make_queries(step, plain)
    begun.decode(q[:1], scaled)
    begun.prefill(q[1:], scaled)
    assert all(layer.out_scale is not None for _, layer in fallback.calls[-2:]) and not library.planned
    fallback.calls.clear()
    compare(backend, make_step("cpu", [9, 20, 12], [1, 7, 9]), plain)
    assert [phase for phase, _ in fallback.calls] == ["decode"] and len(library.planned) == 1


def test_prompts_in_which_the_fallback_leads_are_left(library: FakeFlashInfer, fallback: Recorder) -> None:
    """But no others, and only where FlashInfer is to take what it is ahead in."""
    fallback.leads = True
    backend, step = FlashInferAttention(fallback, "cpu", decode=False, least_prompt=8), make_step("cpu", [20], [12])
    compare(backend, step, make_layer("cpu"))
    assert [phase for phase, _ in fallback.calls] == ["prefill"] and not library.planned
    compare(backend, step, make_layer("cpu", window=LayerWindow(8)))
    compare(FlashInferAttention(fallback, "cpu"), step, make_layer("cpu"))
    assert len(fallback.calls) == 1 and len(library.planned) == 2


def test_prompts_are_written_where_they_are_wanted(backend: FlashInferAttention) -> None:
    step, layer = make_step("cpu", [20, 12], [7, 8]), make_layer("cpu")
    q = make_queries(step, layer)
    out = torch.empty(q.shape, dtype=q.dtype)
    assert backend.begin(step).prefill(q, layer, out) is out
