"""What every registered model must do; float32, transformers as the oracle."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.reference_context import ReferenceCache, forward_step, run_ranks
from tests.support.tiny_models import TINY, has_experts, hf_model, tiny_cases, weight_spellings
from tests.support.tiny_state_space import COUNTS_FROM_ZERO

from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class, registered_architectures
from lamella_core.quantization.config import QuantConfig

LOGITS_BOUND = 3e-5  # largest difference from transformers, logits having a deviation of about 1.5
ALWAYS_FLOAT32 = (".correction_bias", ".a_log", ".d", ".dt_bias")  # half precision would change them too much


def whole(model: Any, prompts: list[list[int]], **kwargs: Any) -> list[torch.Tensor]:
    """Returns the logits of all tokens of each prompt, all prompts in one step."""
    return list(forward_step(model, ReferenceCache(), dict(enumerate(prompts)), **kwargs).values())


def chunked(model: Any, prompt: list[int], size: int) -> torch.Tensor:
    cache = ReferenceCache()
    chunks = [prompt[i : i + size] for i in range(0, len(prompt), size)]
    return torch.cat([forward_step(model, cache, {"it": chunk})["it"] for chunk in chunks])


def test_every_architecture_has_tiny_models() -> None:
    assert sorted(TINY) == registered_architectures("generate")


def test_logits_equal_transformers(
    model: Any, prompts: list[list[int]], logits: list[torch.Tensor], oracle_logits: list[torch.Tensor]
) -> None:
    for prompt, ours, expected in zip(prompts, logits, oracle_logits, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (len(prompt), model.config.vocab_size)
        assert expected.std() > 0.3
        assert (ours - expected).abs().max() < LOGITS_BOUND


def test_greedy_tokens_equal_transformers(
    case: tuple[str, str], model: Any, all_prompts: list[list[int]], greedy_tokens: list[list[int]]
) -> None:
    oracle, is_prefixed = hf_model(*case), model.config.prefix_rule is not None
    for prompt, tokens in zip(all_prompts, greedy_tokens, strict=True):
        if is_prefixed or not follows(oracle, prompt, tokens):
            assert tokens == oracle_tokens(case, oracle, prompt, len(tokens))


@torch.no_grad()
def follows(oracle: Any, prompt: list[int], tokens: list[int]) -> bool:
    """Whether each token is the likeliest after those before it, all seen in one pass: then they are the greedy ones.

    Rotary frequencies that depend on the length may say otherwise of a whole text than of one that grows.
    """
    logits = oracle(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.argmax(-1).tolist() == tokens


@torch.no_grad()
def oracle_tokens(case: tuple[str, str], oracle: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Returns the oracle's greedy tokens, generated one after the other."""
    parameters = signature(getattr(oracle, "forward", oracle)).parameters
    cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
    ids, cache, tokens = torch.tensor([prompt]), None, []
    for _ in range(num_tokens):
        end = len(prompt) + len(tokens)
        more = {"position_ids": torch.arange(end)[None, -ids.shape[1] :]} if case[0] in COUNTS_FROM_ZERO else {}
        step = oracle(ids, **{cache_name: cache}, use_cache=True, **more)
        cache, ids = getattr(step, cache_name), step.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize("size", [1, 4])
def test_chunks_equal_whole(model: Any, prompts: list[list[int]], logits: list[torch.Tensor], size: int) -> None:
    if model.config.prefix_rule is not None:
        pytest.skip("prompts of this model are read in both directions: all at once")
    assert torch.equal(chunked(model, prompts[2], size), logits[2])


def test_neighbours_change_no_bit(model: Any, prompts: list[list[int]]) -> None:
    together = whole(model, [*prompts, *([list(range(3, 30))] * 3)])
    for prompt, logits in zip(prompts, together, strict=False):
        assert torch.equal(logits, whole(model, [prompt])[0])


def check_ranks(hf_dir: Path, model: Any, prompts: list[list[int]], logits: list[torch.Tensor], **mapping: int) -> None:
    """Runs each rank's shard in a thread of its own and compares all logits with the whole model's."""

    def work(rank: int, tp: Any) -> list[torch.Tensor]:
        shard = type(model).from_hugging_face(hf_dir, mapping=Mapping(rank=rank, **mapping))
        assert shard.num_parameters() < 0.8 * model.num_parameters()
        return whole(shard, prompts, tp=tp)

    for rank_logits in run_ranks(mapping["world_size"], work):
        for found, one in zip(rank_logits, logits, strict=True):
            assert (found - one).abs().max() < LOGITS_BOUND


def in_turn(case: tuple[str, str], choices: Sequence[Any]) -> Any:
    """Returns one of the choices by the variant's place: an architecture with several variants meets all."""
    return choices[list(TINY[case[0]]).index(case[1]) % len(choices)]


def test_half_precision_is_near(
    case: tuple[str, str], hf_dir: Path, prompts: list[list[int]], oracle_logits: list[torch.Tensor]
) -> None:
    dtype, bound = in_turn(case, [("bfloat16", 0.08), ("float16", 0.01)])
    half = get_model_class(case[0]).from_hugging_face(hf_dir, dtype=dtype)
    stored = {parameter.dtype for name, parameter in half.named_parameters() if not name.endswith(ALWAYS_FLOAT32)}
    assert stored == {getattr(torch, dtype)}
    for logits, expected in zip(whole(half, prompts), oracle_logits, strict=True):
        assert logits.dtype == torch.float32 and (logits - expected).abs().mean() < bound


def test_fp8_models_keep_the_rules(
    case: tuple[str, str], hf_dir: Path, prompts: list[list[int]], oracle_logits: list[torch.Tensor]
) -> None:
    """Quantized as they are read, with a float8 KV cache: chunks and neighbours change no bit here either."""
    algo = in_turn(case, ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
    model = get_model_class(case[0]).from_hugging_face(hf_dir, quant_config=QuantConfig(algo, "FP8"))
    stored = {parameter.dtype for parameter in model.layers.parameters()}
    assert stored == {torch.float32, torch.float8_e4m3fn} and model.config.quantization.quant_algo == algo
    together = whole(model, prompts)
    if model.config.prefix_rule is None:
        assert torch.equal(chunked(model, prompts[2], 4), together[2])
    assert torch.equal(whole(model, prompts[:1])[0], together[0])
    errors = [(ours - expected).abs().mean() for ours, expected in zip(together, oracle_logits, strict=True)]
    assert 1e-3 < sum(errors) / len(errors) < 0.5


def test_other_spellings_of_the_weights_load(case: tuple[str, str], hf_dir: Path, model: Any, tmp_path: Path) -> None:
    """As transformers holds them in memory; as saved from the bare decoder, where the output layer is tied."""
    shutil.copy(hf_dir / "config.json", tmp_path)
    for tensors in weight_spellings(*case):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        again = type(model).from_hugging_face(tmp_path)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name))


def test_two_tensor_ranks_equal_one(
    hf_dir: Path, model: Any, prompts: list[list[int]], logits: list[torch.Tensor]
) -> None:
    check_ranks(hf_dir, model, prompts, logits, world_size=2, tp_size=2)


@pytest.mark.parametrize("case", [c for c in tiny_cases() if has_experts(*c)], ids="-".join, indirect=True)
@pytest.mark.parametrize(("tp_size", "moe_ep_size"), [(2, 2), (4, 2), (4, 4)])
def test_expert_ranks_equal_one(
    hf_dir: Path,
    model: Any,
    prompts: list[list[int]],
    logits: list[torch.Tensor],
    tp_size: int,
    moe_ep_size: int,
) -> None:
    check_ranks(hf_dir, model, prompts, logits, world_size=tp_size, tp_size=tp_size, moe_ep_size=moe_ep_size)


def test_two_stages_equal_one(
    case: tuple[str, str], hf_dir: Path, model: Any, prompts: list[list[int]], logits: list[torch.Tensor]
) -> None:
    cls = get_model_class(case[0])
    first, last = (
        cls.from_hugging_face(hf_dir, mapping=Mapping(world_size=2, pp_size=2, rank=rank)) for rank in (0, 1)
    )
    assert [*first.attention_specs(), *last.attention_specs()] == model.attention_specs()
    assert [*first.state_specs(), *last.state_specs()] == model.state_specs()
    assert model.has_states == bool(model.state_specs())
    for found, one in zip(whole(first, prompts, stages=[last]), logits, strict=True):
        assert torch.equal(found, one)


def test_dummy_model_builds(model: Any, prompts: list[list[int]]) -> None:
    dummy, again = type(model)(model.config), type(model)(model.config)
    weights = dict(dummy.named_parameters())
    assert {n: p.shape for n, p in weights.items()} == {n: p.shape for n, p in model.named_parameters()}
    for name, parameter in weights.items():
        assert parameter.isfinite().all() and 0 < parameter.abs().max() <= 1e-3
        assert torch.equal(parameter, again.get_parameter(name))
    heads = {tuple(parameter.flatten()[:8].tolist()) for parameter in weights.values()}
    assert len(heads) == len(weights), "two parameters hold the same values"
    assert all(logits.isfinite().all() for logits in whole(dummy, prompts))


def test_config_survives_a_round_trip(model: Any) -> None:
    config = model.config
    assert type(config).from_dict(config.to_dict()) == config
    assert dataclasses.replace(config) == config
