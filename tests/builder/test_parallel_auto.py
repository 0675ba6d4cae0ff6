"""auto_parallel: which sizes the cost model takes, and why; a pure function of shapes and device facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.support.tiny_models import TINY, hf_dir

from lamella_builder.auto_parallel import Choice, DeviceFacts, Workload, choose_mapping, device_facts
from lamella_builder.auto_parallel.shapes import shard_shape
from lamella_core.auto import AutoConfig
from lamella_core.engine import BuildConfig
from lamella_core.errors import ConfigError, OutOfMemoryError
from lamella_core.hardware import find_hardware
from lamella_core.mapping import Mapping
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM
from lamella_core.models.mixtral import MixtralConfig
from lamella_core.models.registry import get_model_class

H100 = DeviceFacts.of_gpu(find_hardware("NVIDIA H100 80GB HBM3"), 8)  # type: ignore[arg-type]
L4 = DeviceFacts.of_gpu(find_hardware("NVIDIA L4"), 8)  # type: ignore[arg-type]
_8B: dict[str, Any] = {
    "architecture": "LlamaForCausalLM", "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
_70B = {**_8B, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**_8B, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    named = {"architecture": "MixtralForCausalLM", "model_type": "mixtral", "vocab_size": 32000}
    return MixtralConfig(**{**_8B, **named, **changes})


def choose(config: Any, world_size: int, facts: DeviceFacts = H100, **limits: Any) -> Choice:
    return choose_mapping(config, BuildConfig(**limits), world_size, facts)


def sizes(choice: Choice) -> tuple[int, int, int]:
    mapping = choice.mapping
    return mapping.tp_size, mapping.pp_size, mapping.moe_ep_size


def test_8b_on_two_gpus_is_split_by_tensors() -> None:
    choice = choose(llama(), 2)
    assert sizes(choice) == (2, 1, 1) and choice.mapping.world_size == 2
    chosen, other = choice.candidates
    assert chosen.estimate.tokens_per_s > other.estimate.tokens_per_s  # type: ignore[union-attr]
    text = choice.explain()
    assert "2 ranks (NVIDIA H100 80GB HBM3" in text and "chosen" in text
    assert "of the chosen speed: reading weights and caches" in text


def test_slow_links_make_it_stages() -> None:
    slow = replace(H100, link_bandwidth=0.2e9, collective_s=1e-3)
    choice = choose(llama(), 2, slow)
    assert sizes(choice) == (1, 2, 1)
    assert "messages between ranks" in choice.explain() or "prompts" in choice.explain()


@pytest.mark.parametrize("world_size", [3, 5])
def test_heads_that_do_not_divide_leave_stages(world_size: int) -> None:
    choice = choose(llama(), world_size)
    assert sizes(choice) == (1, world_size, 1)
    assert f"tp_size {world_size} does not divide num_attention_heads 32" in choice.explain()


def test_no_split_of_that_many_ranks() -> None:
    with pytest.raises(ConfigError, match="7 ranks works.*num_attention_heads 32.*4 layers.*choose another world_size"):
        choose(llama(num_hidden_layers=4), 7)
    for wrong in (0, True, "2"):
        with pytest.raises(ConfigError, match="world_size is"):
            choose(llama(), wrong)  # type: ignore[arg-type]


def test_two_nodes_get_tensors_within_and_stages_across() -> None:
    assert sizes(choose(llama(**_70B), 16)) == (8, 2, 1)
    choice = choose(llama(**_70B), 4, replace(H100, gpus_per_node=2))
    assert sizes(choice) == (2, 2, 1) and choice.mapping.gpus_per_node == 2
    whole = next(c for c in choice.candidates if c.mapping.tp_size == 4)
    assert whole.estimate.link_s > 10 * choice.candidates[0].estimate.link_s  # type: ignore[union-attr]


def test_experts_are_spread_rather_than_cut() -> None:
    for world_size in (2, 8):
        assert sizes(choose(mixtral(), world_size)) == (world_size, 1, world_size)
    choice = choose(mixtral(num_local_experts=6), 4)
    assert sizes(choice) == (4, 1, 2)
    assert "moe_ep_size 4 does not divide the model's 6 experts" in choice.explain()


def test_what_fits_nowhere_is_refused_with_numbers() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        choose(llama(**_70B), 2, L4)
    message = str(caught.value)
    for part in ("2 ranks of 21.00 GiB each", "tp_size 2 x pp_size 1", "weights 65.71 GiB", "Raise world_size"):
        assert part in message


def test_a_split_that_does_not_fit_is_passed_over() -> None:
    # One KV head for all ranks: tensor ranks copy its cache, stages share the layers out.
    config = llama(num_key_value_heads=1, head_dim=1024, hidden_size=512, intermediate_size=512, vocab_size=512)
    facts, workload = replace(H100, memory_bytes=3e9), Workload(1, 1000, 20000, 64)
    choice = choose_mapping(config, BuildConfig(max_num_tokens=64), 4, facts, workload=workload)
    assert choice.mapping.pp_size > 1
    refused = next(c for c in choice.candidates if c.mapping.tp_size == 4)
    assert refused.lacks_bytes > 0 and "one request's keys and values" in str(refused.refusal)


def test_shapes_are_those_of_the_models_themselves() -> None:
    for config in (llama(num_hidden_layers=3, tie_word_embeddings=True), mixtral(num_hidden_layers=3)):
        for tp, pp, ep in ((1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 3, 1)):
            mapping = Mapping(world_size=tp * pp, tp_size=tp, pp_size=pp, moe_ep_size=ep)
            shard = shard_shape(config, Mapping(world_size=tp, tp_size=tp, moe_ep_size=ep))
            model_class = get_model_class(config.architecture, config.model_type)
            for stage in range(pp):
                seen = mapping.with_rank(stage * tp)
                exact = model_class.empty(config.with_mapping(seen)).weight_bytes()
                assert exact - shard.stage_bytes(mapping, stage) in (0, 2 * config.hidden_size)  # but the last norm
    layers = shard_shape(llama(num_hidden_layers=4), Mapping(2, tp_size=2)).layers
    assert sum(layer.num_reductions for layer in layers) == 8
    assert LlamaForCausalLM.empty(llama()).num_parameters() == 8_030_261_248


def test_workload_follows_the_limits() -> None:
    short = Workload.of(llama(), BuildConfig(max_seq_len=64, max_batch_size=4, max_beam_width=2))
    assert (short.num_requests, short.isl, short.osl) == (8, 32, 32)
    assert Workload.of(llama(), BuildConfig()).isl == 1000


def test_ranks_of_one_host_share_it() -> None:
    one, four = device_facts("cpu", 1), device_facts("cpu", 4)
    assert four.bandwidth == pytest.approx(one.bandwidth / 4) and four.gpus_per_node == 4
    assert device_facts("cpu", 4, gpus_per_node=2).bandwidth == pytest.approx(one.bandwidth / 2)


@pytest.mark.parametrize(
    ("architecture", "reductions"),
    [("DeepseekV3ForCausalLM", 2), ("FalconForCausalLM", 1), ("GPT2LMHeadModel", 2), ("Mamba2ForCausalLM", 1)],
)
def test_other_kinds_of_layers(architecture: str, reductions: int) -> None:
    config = AutoConfig.from_hugging_face(hf_dir(architecture, next(iter(TINY[architecture]))))
    whole = Mapping()
    exact = get_model_class(config.architecture, config.model_type).empty(config).weight_bytes()
    last_norm = exact - shard_shape(config, whole).stage_bytes(whole, 0)
    assert 0 <= last_norm <= 2 * config.hidden_size * config.torch_dtype.itemsize
    layers = shard_shape(config, Mapping(2, tp_size=2)).layers
    assert sum(layer.num_reductions for layer in layers) == reductions * len(layers)
    assert all(layer.kv_bytes + layer.state_bytes > 0 for layer in layers)
    assert choose(config, 2).mapping.world_size == 2
