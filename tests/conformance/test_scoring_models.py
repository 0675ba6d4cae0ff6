"""What every registered model that scores texts must do; float32, transformers or a reference as the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.support.reference_context import run_ranks
from tests.support.tiny_scoring import TINY_SCORING, oracle_scores, scoring_cases, scoring_model

from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class, registered_architectures
from lamella_executor.scoring.packed import PackedContext

BOUND = 3e-5
TEXTS = [[5, 17, 99, 4, 130, 8, 33], [12], [101, 7, 7, 64, 2, 9, 55, 31, 90, 11, 3], [5, 17, 99, 4, 130, 8, 34]]


@pytest.fixture(params=scoring_cases(), ids="-".join)
def case(request):
    return request.param


def scores(model, texts, types=None, **context):
    lengths = [len(text) for text in texts]
    packed_types = None if types is None else torch.tensor([t for own in types for t in own])
    ctx = PackedContext(lengths, is_causal=model.is_causal, token_types=packed_types, **context)
    ids = torch.tensor([token for text in texts for token in text])
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model(ids, positions, ctx)
    out = []
    for rows in hidden.split(lengths):
        chosen = {"first": rows[:1], "last": rows[-1:], "tokens": rows}[model.pooling]
        found = model.compute_logits(chosen, ctx)
        out.append(found if model.pooling == "tokens" else found[0])
    return out


def load(case, **options):
    return get_model_class(case[0]).from_hugging_face(scoring_model(*case)[0], **options)


def test_every_scoring_architecture_has_tiny_models():
    assert sorted(TINY_SCORING) == registered_architectures("score")


@torch.inference_mode()
def test_scores_equal_the_oracle(case):
    model, oracle = load(case), scoring_model(*case)[1]
    for text, found in zip(TEXTS, scores(model, TEXTS), strict=True):
        expected = oracle_scores(case[0], oracle, text)
        assert found.shape == expected.shape == (*expected.shape[:-1], len(model.config.labels))
        assert (found - expected).abs().max() < BOUND


@torch.inference_mode()
def test_token_types_count(case):
    model, oracle = load(case), scoring_model(*case)[1]
    if getattr(model.config, "type_vocab_size", 1) < 2:
        pytest.skip("texts have one part")
    types = [[int(place >= len(text) // 2) for place in range(len(text))] for text in TEXTS]
    for text, parts, found in zip(TEXTS, types, scores(model, TEXTS, types), strict=True):
        assert (found - oracle_scores(case[0], oracle, text, parts)).abs().max() < BOUND
    assert not torch.allclose(scores(model, TEXTS, types)[0], scores(model, TEXTS)[0], atol=1e-3)


@torch.inference_mode()
def test_two_tensor_ranks_and_two_stages_equal_one(case):
    whole = scores(load(case), TEXTS)

    def work(rank, tp):
        return scores(load(case, mapping=Mapping(world_size=2, tp_size=2, rank=rank)), TEXTS, tp=tp)

    for found in run_ranks(2, work):
        assert all((a - b).abs().max() < BOUND for a, b in zip(found, whole, strict=True))
    first, last = (load(case, mapping=Mapping(world_size=2, pp_size=2, rank=rank)) for rank in (0, 1))
    text = TEXTS[0]
    ctx = PackedContext([len(text)], is_causal=first.is_causal)
    positions = torch.arange(len(text))
    hidden = last(torch.tensor(text), positions, ctx, hidden=first(torch.tensor(text), positions, ctx))
    rows = {"first": hidden[:1], "last": hidden[-1:], "tokens": hidden}[last.pooling]
    assert torch.allclose(last.compute_logits(rows, ctx), whole[0], atol=BOUND)


def test_dummy_models_and_configs(case):
    model = load(case)
    dummy = type(model)(model.config)
    assert {n: p.shape for n, p in dummy.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    config = model.config
    assert type(config).from_dict(config.to_dict()) == config == dataclasses.replace(config)


def test_labels_are_read():
    config = load(("BertForSequenceClassification", "three_labels")).config
    assert (config.labels, config.problem_type) == (("bad", "fair", "good"), "single_label_classification")
    assert load(("BertForSequenceClassification", "regression")).config.problem_type == "regression"
