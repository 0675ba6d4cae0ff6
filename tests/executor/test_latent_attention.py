"""Models with a latent KV cache through the whole executor: same tokens whatever the scheduling and the cache do."""

from __future__ import annotations

import pytest
import torch
from tests.support.engines import engine_of
from tests.support.engines import greedy as greedy_of
from tests.support.executors import BLOCK, bench, greedy, hf_greedy, prompt, tiny_model
from tests.support.tiny_models import hf_dir

from lamella_core.engine import Engine
from lamella_core.models.registry import get_model_class
from lamella_core.quantization.config import QuantConfig
from lamella_executor import CapacitySchedulerPolicy, KvCacheConfig, SchedulerConfig
from lamella_executor.attention.paged_cpu import PagedKvCache
from lamella_executor.memory import block_bytes

V2, LITE = ("DeepseekV2ForCausalLM", "limited"), ("DeepseekV2ForCausalLM", "lite_yarn")
V3 = ("DeepseekV3ForCausalLM", "yarn_groups")
PROMPTS = [prompt(length) for length in (3, 17, 1, 30, 9, 23)]
NUM_NEW = 12

CONFIGS = {
    "plain": {},
    "chunked": {"max_num_tokens": 8},
    "one_token_steps": {"max_num_tokens": 1, "max_batch_size": 1, "max_beam_width": 1},
    "no_reuse": {"kv": KvCacheConfig(max_tokens=1024, enable_block_reuse=False)},
    "continuous": {"kv_cache_type": "continuous"},
}


@pytest.mark.parametrize("model", [V2, LITE, V3], ids="-".join)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_equal_transformers(name, model):
    with bench(model, **CONFIGS[name]) as it:
        for _ in range(2):  # the second time finds the first one's blocks
            results = it.executor.generate(PROMPTS, greedy(NUM_NEW))
            assert [r.outputs[0].token_ids for r in results] == [hf_greedy(ids, NUM_NEW, model) for ids in PROMPTS]
        assert it.idle_blocks() == (0, 0)


def test_pauses_and_copied_blocks_change_nothing():
    scheduler = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
    with bench(V3, kv=KvCacheConfig(max_tokens=56), scheduler=scheduler) as it:
        results = it.executor.generate(PROMPTS, greedy(20))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(ids, 20, V3) for ids in PROMPTS]
        assert sum(r.metrics.num_pauses for r in results) > 0
    with bench(V3) as it:  # beams copy the block that they share and write to
        beams = it.executor.generate(PROMPTS[1], greedy(NUM_NEW, n=3, use_beam_search=True))
        alone = it.executor.generate(PROMPTS[1], greedy(NUM_NEW, n=1))
        assert len({tuple(output.token_ids) for output in beams.outputs}) == 3
        assert alone.outputs[0].token_ids == hf_greedy(PROMPTS[1], NUM_NEW, V3)
        assert it.idle_blocks() == (0, 0)


def test_a_window_over_latents_keeps_what_it_shows():
    """A window as wide as what is seen changes nothing; a narrower one does, in chunks as at once."""
    wide = KvCacheConfig(max_tokens=1024, max_attention_window=(64,))
    with bench(V2, kv=wide) as it:
        assert it.executor.generate(PROMPTS[3], greedy(8)).outputs[0].token_ids == hf_greedy(PROMPTS[3], 8, V2)
    narrow, tokens = KvCacheConfig(max_tokens=1024, max_attention_window=(7,)), []
    for limit in (64, 5):
        with bench(V2, kv=narrow, max_num_tokens=limit, max_batch_size=4, max_beam_width=1) as it:
            tokens.append(it.executor.generate(PROMPTS[3], greedy(8)).outputs[0].token_ids)
    assert tokens[0] == tokens[1] != hf_greedy(PROMPTS[3], 8, V2)


@pytest.mark.parametrize("model", [LITE, V3], ids="-".join)
def test_a_built_engine_is_saved_and_loaded(model, tmp_path):
    """Absorbed matrices are parameters, laid out for kernels like others."""
    engine = engine_of(hf_dir(*model), "cpu", tokens_per_block=8)
    engine.save(tmp_path / "engine")
    expected = [hf_greedy(ids, NUM_NEW, model) for ids in PROMPTS]
    assert (
        greedy_of(engine, PROMPTS, NUM_NEW) == greedy_of(Engine.load(tmp_path / "engine"), PROMPTS, NUM_NEW) == expected
    )


def test_the_cache_holds_keys_alone():
    specs, dtype = tiny_model(*V3).attention_specs(), torch.float32
    cache = PagedKvCache(specs, 3, BLOCK, dtype)
    numbers = 0
    for spec in specs:
        keys, values = cache.layer(spec.layer_idx)
        assert (keys.shape[1], keys.shape[3], values.shape[3]) == (1, 28, 20)
        keys[1] = torch.arange(keys[1].numel()).view(keys[1].shape)
        assert torch.equal(values[1], keys[1][..., 8:])
        numbers += keys[1].numel()
    assert block_bytes(specs, dtype, BLOCK) == numbers * dtype.itemsize
    cache.copy_blocks([(1, 2), (2, 0)])
    assert all(torch.equal(cache.layer(s.layer_idx)[0][0], cache.layer(s.layer_idx)[0][1]) for s in specs)


def test_a_float8_cache_has_one_scale_for_both():
    model = get_model_class(V3[0]).from_hugging_face(hf_dir(*V3), quant_config=QuantConfig(None, "FP8"))
    scales = [p for name, p in model.named_parameters() if name.endswith("kv_scales")]
    assert len(scales) == 2 and all(torch.equal(p, torch.ones(2)) for p in scales)
    tokens = []
    for limit in (64, 8):
        with bench(model, max_num_tokens=limit) as it:
            results = it.executor.generate(PROMPTS, greedy(NUM_NEW))
            tokens.append([r.outputs[0].token_ids for r in results])
    assert tokens[0] == tokens[1]
