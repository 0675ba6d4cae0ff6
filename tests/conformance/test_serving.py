"""Every architecture through the executor, on a cache too small for all: batched, in chunks, paused, resumed, reused.

The tokens are those of the reference context, which `test_models` compares with transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.executors import bench
from tests.support.executors import greedy as greedy_params
from tests.support.reference_context import greedy

from lamella_executor import CapacitySchedulerPolicy, KvCacheConfig, SchedulerConfig

SECOND_TIME = 8  # tokens to generate when all are asked again
MOST_TOKENS = 56  # of a sequence
TIGHT = KvCacheConfig(max_tokens=100)  # three sequences grow to 49, 44 and 33


def test_served_tokens_are_those_of_each_alone(
    hf_dir: Path, model: Any, all_prompts: list[list[int]], greedy_tokens: list[list[int]]
) -> None:
    config, prompts = model.config, all_prompts
    is_whole = config.prefix_rule is not None  # prompts that are read in both directions, in one step
    longest = min(MOST_TOKENS, config.max_position_embeddings)
    num_tokens = len(greedy_tokens[0])
    model = type(model).from_hugging_face(hf_dir)  # serving changes it
    if config.rope is not None and config.rope.rope_type == "longrope":  # rotates by the longest sequence to come
        model.set_max_seq_len(longest)
        greedy_tokens = greedy(model, prompts, num_tokens)
    expected = [tokens[: longest - len(ids)] for ids, tokens in zip(prompts, greedy_tokens, strict=True)]
    num_pauses = 0
    limits = {"max_batch_size": 3, "max_num_tokens": 40 if is_whole else 9, "max_seq_len": longest}
    scheduler = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
    with bench(model, TIGHT, scheduler, max_beam_width=1, **limits) as it:
        for count in (num_tokens, SECOND_TIME):  # the second time parts are still there
            with it.held():
                results = [it.executor.generate_async(ids, greedy_params(count)) for ids in prompts]
            assert [result.result().outputs[0].token_ids for result in results] == [ids[:count] for ids in expected]
            num_pauses += sum(result.metrics.num_pauses for result in results)
        specs = model.attention_specs()
        grows = any(spec.sliding_window is None for spec in specs) and longest == MOST_TOKENS
        assert not grows or num_pauses > 0
        is_kept = bool(specs) and not (model.has_states or is_whole)
        assert (it.kv.stats().num_reused_tokens > 0) == is_kept
        assert it.idle_blocks() == (0, 0)
