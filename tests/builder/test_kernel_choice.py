"""Choosing kernels: which candidates are timed, when, and which one wins."""

from __future__ import annotations

import json

import pytest
import torch

from lamella_builder import BuildConfig
from lamella_builder.steps import kernels
from lamella_builder.steps.kernels import Choice, Shape, choose_kernels, recorded_choices, row_counts, time_plans
from lamella_core.engine import Engine
from lamella_core.kernels.matmul import MatmulPlan, candidate_plans, default_plan
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM

LIMITS = BuildConfig(max_batch_size=4, max_num_tokens=64, opt_num_tokens=4)


def model(dtype: str = "float32") -> LlamaForCausalLM:
    """Its qkv and o shapes are worth timing (256 x 256), its MLP is not; the output layer is."""
    return LlamaForCausalLM(
        LlamaConfig(
            architecture="LlamaForCausalLM", model_type="llama", vocab_size=512, hidden_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, head_dim=64, intermediate_size=16,
            max_position_embeddings=128, dtype=dtype,
        )
    )  # fmt: skip


def test_each_shape_is_timed_once_and_small_ones_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Shape] = []

    def fake(plans: list[MatmulPlan], shape: Shape, rows: list[int]) -> list[dict[int, float]]:
        timed.append(shape)
        return [dict.fromkeys(rows, 1.0 + index) for index in range(len(plans))]

    monkeypatch.setattr(kernels, "time_plans", fake)
    choices = choose_kernels(model("bfloat16"), LIMITS, lambda done, total: None)
    assert sorted((s.n, s.k) for s in timed) == [(256, 256), (512, 256), (768, 256)]
    assert {shape: choice.count for shape, choice in choices.items()} == {
        Shape(768, 256, torch.bfloat16, False): 2,
        Shape(256, 256, torch.bfloat16, False): 2,
        Shape(32, 256, torch.bfloat16, False): 2,
        Shape(256, 16, torch.bfloat16, False): 2,
        Shape(512, 256, torch.bfloat16, True): 1,
    }
    small = Shape(32, 256, torch.bfloat16, False)
    assert choices[small].plan == default_plan(torch.bfloat16, 32, 256, batch_invariant=False)
    assert choices[timed[0]].plan == choices[timed[0]].milliseconds[0][0]  # the fastest of the fake times


def test_the_winner_is_best_over_all_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = candidate_plans(torch.bfloat16, 256, 256, require_batch_invariant=False)
    assert len(candidates) >= 2
    times = [{1: 9.0, 4: 9.0, 64: 9.0} for _ in candidates]
    times[0] = {1: 1.0, 4: 1.0, 64: 100.0}  # decodes best, hopeless for prompts
    times[1] = {1: 1.5, 4: 1.5, 64: 2.0}
    monkeypatch.setattr(kernels, "time_plans", lambda plans, shape, rows: times)
    choices = choose_kernels(model("bfloat16"), LIMITS, lambda done, total: None)
    assert choices[Shape(256, 256, torch.bfloat16, False)].plan == candidates[1]


@pytest.mark.parametrize("selection", ["timed", "default"])
def test_float32_gets_batch_invariant_kernels_only(selection: str) -> None:
    limits = BuildConfig(max_batch_size=4, max_num_tokens=16, opt_num_tokens=4, kernel_selection=selection)
    choices = choose_kernels(model(), limits, lambda done, total: None)
    for choice in choices.values():
        assert choice.plan.batch_invariant
        assert all(plan.batch_invariant for plan, _ in choice.milliseconds)
    if selection == "default":
        assert not any(choice.milliseconds for choice in choices.values())


def test_rows_timed_are_those_of_decoding_and_of_prompts() -> None:
    inner, output = Shape(8, 8, torch.float32, False), Shape(8, 8, torch.float32, True)
    assert row_counts(inner, BuildConfig(opt_num_tokens=16)) == [1, 16, 256]
    assert row_counts(output, BuildConfig(opt_num_tokens=16)) == [1, 16]
    assert row_counts(inner, BuildConfig(max_num_tokens=8, opt_num_tokens=4)) == [1, 4, 8]
    assert row_counts(inner, BuildConfig(max_batch_size=1, max_num_tokens=1)) == [1]


def test_times_are_positive_and_shared_kernels_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [
        MatmulPlan("rows", ((None, "torch_rows"),)),
        MatmulPlan("rows", ((2, "torch_upcast"), (None, "torch_rows"))),
    ]
    measured: list[int] = []
    interleaved = kernels._interleaved

    def counted(runs: list, seconds: float) -> list[float]:  # type: ignore[type-arg]
        measured.append(len(runs))
        return interleaved(runs, seconds)

    monkeypatch.setattr(kernels, "_interleaved", counted)
    first, second = time_plans(plans, Shape(24, 16, torch.bfloat16, False), [1, 8])
    assert measured == [2, 1]
    assert first.keys() == second.keys() == {1, 8} and min(*first.values(), *second.values()) > 0
    assert first[8] == second[8]


def test_sampling_stops_in_time_and_drops_the_hopeless() -> None:
    calls = [0, 0, 0]

    def run(index: int, seconds: float):  # type: ignore[no-untyped-def]
        def call() -> float:
            calls[index] += 1
            return seconds

        return call

    medians = kernels._interleaved([run(0, 0.001), run(1, 0.0015), run(2, 0.1)], seconds=60)
    assert medians == [0.001, 0.0015, 0.1]
    assert calls == [kernels.SAMPLES + 1, kernels.SAMPLES + 1, 1]  # the last: given up after its first call
    calls[:] = [0, 0, 0]
    assert kernels._interleaved([run(0, 0.001), run(1, 0.003)], seconds=60) == [0.001, 0.003]
    assert calls[:2] == [kernels.SAMPLES + 1, 2]
    calls[:] = [0, 0, 0]
    kernels._interleaved([run(0, 0.001)], seconds=0)
    assert calls[0] == 2


def test_records_are_json_and_can_be_taken_over() -> None:
    made = model("bfloat16")
    choices = choose_kernels(made, LIMITS, lambda done, total: None)
    records = tuple(json.loads(json.dumps(choice.to_dict())) for choice in choices.values())
    known = recorded_choices(Engine.from_model(made, timings=records).spec)
    assert {shape: choice.plan for shape, choice in known.items()} == {s: c.plan for s, c in choices.items()}
    again = choose_kernels(made, LIMITS, lambda done, total: None, known)
    assert again == known and all(isinstance(choice, Choice) for choice in again.values())
