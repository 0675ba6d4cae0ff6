"""The same request gives the same tokens however the engine gets there, on a GPU as on the CPU; memory stays clean."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.engines import engine_of, greedy
from tests.support.tiny_models import hf_dir

from lamella_executor import CapacitySchedulerPolicy, SchedulerConfig

LLAMA = hf_dir("LlamaForCausalLM", "grouped")
LIMITS = {"max_batch_size": 8, "tokens_per_block": 16}


@pytest.fixture
def expected(prompts) -> list[list[int]]:
    return greedy(engine_of(LLAMA, "cpu", **LIMITS), prompts)


def test_chunked_prompts_equal_whole_ones(prompts, expected):
    assert greedy(engine_of(LLAMA, "cuda", **LIMITS), prompts) == expected
    assert greedy(engine_of(LLAMA, "cuda", max_num_tokens=9, **LIMITS), prompts) == expected


def test_paused_requests_equal_undisturbed_ones(prompts, expected):
    """Nine blocks hold about two of the six requests at their end."""
    policy = SchedulerConfig(capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION)
    tight = {"scheduler": policy, "max_tokens": 9 * 16, "enable_block_reuse": False}
    assert greedy(engine_of(LLAMA, "cuda", **LIMITS), prompts, **tight) == expected


def test_reused_prefixes_equal_computed_ones(prompts, expected):
    again = [*prompts, *prompts]
    assert greedy(engine_of(LLAMA, "cuda", **{**LIMITS, "max_batch_size": 2}), again) == [*expected, *expected]


def test_a_window_on_a_gpu_equals_one_on_the_cpu(prompts):
    directory = hf_dir("MistralForCausalLM", "window")
    cpu, gpu = (greedy(engine_of(directory, device, **LIMITS), prompts) for device in ("cpu", "cuda"))
    assert gpu == cpu


@pytest.mark.parametrize(
    "case",
    [
        ("ChatGLM1Model", "chat"),
        ("ChatGLM1Model", "blank_before_the_end"),
        ("GLMModel", "last_blank"),
        ("Phi3SmallForCausalLM", "sparse_first"),
        ("Phi3SmallForCausalLM", "alike_untied"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_prefixes_and_sparse_attention_on_a_gpu_equal_those_on_the_cpu(case, backend, prompts):
    """In recorded steps too, and where requests are paused and read their prompts again."""
    policy = SchedulerConfig(capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION)
    short = [prompt[:30] for prompt in prompts]
    cpu = greedy(engine_of(hf_dir(*case), "cpu", **LIMITS), short)
    engine = engine_of(hf_dir(*case), "cuda", max_num_tokens=48, **LIMITS)
    assert greedy(engine, short, attn_backend=backend) == cpu
    assert greedy(engine, short, attn_backend=backend, scheduler=policy, max_tokens=9 * 16) == cpu


@pytest.mark.parametrize(
    "case",
    [
        ("MambaForCausalLM", "odd_state"),
        ("FalconMambaForCausalLM", "tied"),
        ("Mamba2ForCausalLM", "grouped"),
        ("Mamba2ForCausalLM", "biased_odd_state"),
        ("BambaForCausalLM", "attention_last"),
        ("NemotronHForCausalLM", "all_kinds"),
        ("NemotronHForCausalLM", "experts_on_latents"),
        ("JambaForCausalLM", "attention_and_experts_last"),
        ("Qwen3NextForCausalLM", "attention_last"),
        ("Qwen3NextForCausalLM", "odd_heads"),
    ],
    ids="-".join,
)
def test_recurrent_states_on_a_gpu_equal_those_on_the_cpu(case, prompts):
    directory = hf_dir(*case)
    expected = greedy(engine_of(directory, "cpu", **LIMITS), prompts)
    assert greedy(engine_of(directory, "cuda", **LIMITS), prompts) == expected
    assert greedy(engine_of(directory, "cuda", max_num_tokens=9, **LIMITS), prompts) == expected


def test_kernels_touch_no_memory_that_is_not_theirs():
    """Prompts, replayed and eager steps, every kind of sampling, float8: under compute-sanitizer's memcheck."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    script = Path(__file__).with_name("sanitized_steps.py")
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script), str(LLAMA)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
