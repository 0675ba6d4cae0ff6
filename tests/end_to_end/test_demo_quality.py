"""The demo model's text through Lamella is transformers' text, and its perplexity is the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella import LLM, SamplingParams

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
MODEL = DEMO / "demo-4m"
PROMPTS = [
    "Once upon a time, a little fox named",
    "On her birthday, Anna the goat got a blue kite",
    "Question: What is 7 + 5?\nAnswer:",
    "Long ago, a small mouse named Rosie lived in",
]


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(MODEL)


def test_greedy_text_equals_transformers(llm: LLM, reference):
    model, tokenizer = reference
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, SamplingParams(max_tokens=80))):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, do_sample=False, max_new_tokens=80)[0, ids.shape[1] :]
        assert output.text == tokenizer.decode(made, skip_special_tokens=True)


def test_it_knows_its_sums(llm: LLM):
    output = llm.generate(PROMPTS[2], SamplingParams(max_tokens=20))
    assert "12" in output.text
    assert output.outputs[0].finish_reason == "stop"


def test_chat(llm: LLM):
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": "What is three plus two?"}])
    output = llm.generate(prompt, SamplingParams(max_tokens=20, add_special_tokens=False))
    assert "five" in output.text.lower() or "5" in output.text
    assert output.outputs[0].finish_reason == "stop"


def test_perplexity_equals_transformers(llm: LLM, reference):
    model, tokenizer = reference
    documents = (DEMO / "heldout.txt").read_text(encoding="utf-8").split("\n\n")[:12]
    prompts = [tokenizer(document).input_ids[:400] for document in documents]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    ours = theirs = 0.0
    for ids, output in zip(prompts, outputs):
        ours -= sum(entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:]))
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        theirs -= float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    count = sum(len(ids) - 1 for ids in prompts)
    assert math.exp(ours / count) == pytest.approx(math.exp(theirs / count), rel=1e-3)
    assert math.exp(ours / count) < 2


def test_engine_of_the_demo_model(llm: LLM, tmp_path: Path):
    llm.save(tmp_path / "engine")
    with LLM(tmp_path / "engine") as engine:
        params = SamplingParams(max_tokens=40)
        assert [o.text for o in engine.generate(PROMPTS, params)] == [o.text for o in llm.generate(PROMPTS, params)]
