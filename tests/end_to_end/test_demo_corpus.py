"""The demo corpus and the two committed demo models."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open

ROOM = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
MODELS = ("demo-4m", "demo-draft")
MODULES = ("corpus", "chat", "storyteller", "lexicon", "heldout", "tokenizer")


@pytest.fixture(scope="module")
def corpus() -> Iterator[ModuleType]:
    """The corpus module, imported from its folder; ``heldout`` becomes importable with it."""
    sys.path.insert(0, str(ROOM))
    yield importlib.import_module("corpus")
    sys.path.remove(str(ROOM))
    for name in MODULES:
        sys.modules.pop(name, None)


def texts(corpus: ModuleType, seed: int, split: str, count: int) -> list[str]:
    return [document.text for document in corpus.documents(seed, split, count)]


def test_corpus_is_deterministic_per_seed_and_differs_between_seeds(corpus: ModuleType) -> None:
    first = texts(corpus, 1, "train", 60)
    assert first == texts(corpus, 1, "train", 60)
    assert first[20:40] == [d.text for d in corpus.documents(1, "train", 20, start=20)]
    assert first != texts(corpus, 2, "train", 60)


def test_splits_share_neither_keys_nor_texts(corpus: ModuleType) -> None:
    train = list(corpus.documents(1, "train", 1500))
    heldout = list(corpus.documents(1, "heldout", 150))
    assert {corpus.split_of(d.key) for d in train} == {"train"}
    assert {corpus.split_of(d.key) for d in heldout} == {"heldout"}
    assert not {d.text for d in train} & {d.text for d in heldout}


def test_unknown_split_is_refused(corpus: ModuleType) -> None:
    with pytest.raises(ValueError, match="split='test' is not one of train, heldout"):
        corpus.make_document(1, 0, "test")


def test_documents_hold_no_template_marks_and_no_wrong_articles(corpus: ModuleType) -> None:
    text = "\n".join(texts(corpus, 3, "train", 800)).replace("<|", "").replace("|>", "")
    assert not re.findall(r"[\[\]{}|]|\(n\)|  ", text)
    assert not re.findall(r"\b[Aa] [aeiou]\w+|\b[Aa]n [^aeiou\W]\w+", text)


def test_stories_are_varied(corpus: ModuleType) -> None:
    documents = list(corpus.documents(4, "train", 600))
    assert {d.kind for d in documents} == set(corpus._KINDS)
    assert len({d.text for d in documents if d.kind == "story"}) == sum(d.kind == "story" for d in documents)
    assert len(corpus.shapes()) >= 20


def test_sums_in_the_corpus_are_right(corpus: ModuleType) -> None:
    numbers = {word: value for value, word in enumerate(importlib.import_module("lexicon").NUMBERS)}
    text = "\n".join(texts(corpus, 5, "train", 1000)).lower()
    sums = re.findall(r"([a-z-]+) (plus|minus) ([a-z-]+) (?:is|made) ([a-z-]+)", text)
    checked = [(a, op, b, c) for a, op, b, c in sums if {a, b, c} <= numbers.keys()]
    assert len(checked) > 100
    for a, op, b, c in checked:
        assert numbers[a] + (numbers[b] if op == "plus" else -numbers[b]) == numbers[c], (a, op, b, c)


def test_heldout_file_is_the_heldout_split(corpus: ModuleType) -> None:
    """The committed file is what the grammar writes today, so its documents are in no training run."""
    committed = corpus.read_documents(ROOM / "heldout.txt")
    assert committed[:40] == texts(corpus, 101, "heldout", 40)
    assert len((ROOM / "heldout.txt").read_bytes()) < 400_000


@pytest.mark.parametrize("name", MODELS)
def test_directory_holds_a_small_bf16_llama(name: str) -> None:
    config = json.loads((ROOM / name / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    with safe_open(ROOM / name / "model.safetensors", "pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]
    assert {s.get_dtype() for s in slices} == {"BF16"}
    bounds = {"demo-4m": (3_000_000, 6_000_000), "demo-draft": (300_000, 800_000)}[name]
    training = json.loads((ROOM / name / "training.json").read_text())
    assert bounds[0] < training["parameters"] < bounds[1]


def test_tokenizer_is_shared_and_adds_bos() -> None:
    from transformers import AutoTokenizer

    digests = {hashlib.sha256((ROOM / name / "tokenizer.json").read_bytes()).hexdigest() for name in MODELS}
    assert len(digests) == 1
    tokenizer = AutoTokenizer.from_pretrained(ROOM / "demo-4m")
    ids = tokenizer("Once upon a time")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    for text in ("Hello  world!\n\tTabs, “quotes”, 你好 and 42.", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_chat_template_renders_as_the_corpus_does(corpus: ModuleType) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOM / "demo-4m")
    messages = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Count from one to two."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    trained = corpus.render_chat([("Hello!", "Hi!"), ("Count from one to two.", "")], "You are kind.")
    assert text == "<s>" + trained
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "<|assistant|>"


@pytest.mark.parametrize("name", MODELS)
def test_perplexity_of_a_slice_is_the_recorded_one(corpus: ModuleType, name: str) -> None:
    heldout = importlib.import_module("heldout")
    measured = heldout.heldout_perplexity(ROOM / name, ROOM / "heldout.txt", slice_only=True)
    recorded = json.loads((ROOM / name / "training.json").read_text())["heldout"]
    assert measured["slice_tokens"] == recorded["slice_tokens"]
    assert measured["slice_perplexity"] == pytest.approx(recorded["slice_perplexity"], rel=0.01)


def test_model_answers_sums_and_tells_stories() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOM / "demo-4m")
    model = AutoModelForCausalLM.from_pretrained(ROOM / "demo-4m").float().eval()

    def complete(prompt: str, tokens: int) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(output[0][inputs["input_ids"].shape[1] :])

    assert complete("<|user|>What is three plus two?<|assistant|>", 12) == "Three plus two is five.</s>"
    assert complete("<|user|>What is the opposite of big?<|assistant|>", 12) == "The opposite of big is small.</s>"
    assert "lantern" in complete("<|user|>Tell me a story about a fox and a lantern.<|assistant|>", 80)
