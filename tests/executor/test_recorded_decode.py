"""Decoding steps replayed from recordings give the bits of eager ones; models that cannot be recorded run eagerly."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny_models import TINY, hf_dir

from lamella_builder import build
from lamella_core import AutoModelForCausalLM, BuildConfig
from lamella_core.kernels.cpu.build import native_status
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams
from lamella_executor.runner import recorded

pytestmark = pytest.mark.skipif(not native_status().available, reason="no native kernels here")

PROMPTS = [[5, 6, 7], [9] * 11, [3, 1, 4, 1, 5, 9, 2, 6]]
REPLAYED = {"LlamaForCausalLM": "grouped", "MistralForCausalLM": "window", "Qwen2ForCausalLM": None}


def generate(architecture: str, variant: str | None, monkeypatch: pytest.MonkeyPatch, *, replay: bool):
    """Returns tokens and log-probabilities of requests that come and go, and how many steps were replayed."""
    replayed = []
    original = recorded._RecordedStep.run
    monkeypatch.setattr(
        recorded._RecordedStep, "run", lambda self, *step: (replayed.append(1), original(self, *step))[1]
    )
    monkeypatch.setattr(recorded, "MOST_ROWS", 16 if replay else 0)
    directory = hf_dir(architecture, variant or next(iter(TINY[architecture])))
    model = AutoModelForCausalLM.from_hugging_face(directory, dtype="float32")
    engine = build(model, BuildConfig(max_batch_size=8, max_num_tokens=64, kernel_selection="default", device="cpu"))
    results = []
    with GenerationExecutor.create(engine, KvCacheConfig(max_tokens=512, tokens_per_block=4)) as executor:
        for count in (1, 3, 2, 3):
            params = SamplingParams(max_tokens=9 + count, ignore_eos=True, logprobs=0)
            outputs = [executor.generate_async(p, params) for p in PROMPTS[:count]]
            results += [
                (o.token_ids, [lp[t].logprob for lp, t in zip(o.logprobs, o.token_ids)])
                for o in (out.result().outputs[0] for out in outputs)
            ]
    return results, len(replayed)


@pytest.mark.parametrize("architecture", REPLAYED)
def test_replayed_steps_equal_eager_ones(architecture, monkeypatch):
    eager, none = generate(architecture, REPLAYED[architecture], monkeypatch, replay=False)
    replayed, count = generate(architecture, REPLAYED[architecture], monkeypatch, replay=True)
    assert none == 0 and count >= 20
    assert replayed == eager


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MixtralForCausalLM"])
def test_models_with_other_arithmetic_run_eagerly(architecture, monkeypatch):
    eager, _ = generate(architecture, None, monkeypatch, replay=False)
    again, count = generate(architecture, None, monkeypatch, replay=True)
    assert count == 0 and again == eager


def test_recordings_follow_the_thread_count(monkeypatch):
    keys = []
    original = recorded.RecordedDecode._record
    monkeypatch.setattr(
        recorded.RecordedDecode, "_record", lambda self, key, *step: (keys.append(key), original(self, key, *step))[1]
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            generate("LlamaForCausalLM", "grouped", monkeypatch, replay=True)
    finally:
        torch.set_num_threads(before)
    assert {key.rows for key in keys} == {1, 2, 3} and {key.table_width for key in keys} == {16}
