"""Stages in processes of their own: an engine directory with a file for each rank, opened like any other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from tests.support.executors import LLAMA, greedy, hf_beams, hf_greedy, hf_logprobs, prompt
from tests.support.tiny_models import hf_dir
from tests.support.worker_crews import children

from lamella_core.engine import BuildConfig, Engine, EngineWriter
from lamella_core.errors import EngineDeadError
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_executor import GenerationExecutor, KvCacheConfig

PROMPTS = [prompt(length) for length in (3, 17, 1, 30, 9, 8)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Engine directories of two stages, by tp_size."""
    config = BuildConfig(max_batch_size=8, max_num_tokens=16, max_seq_len=64, tokens_per_block=4, max_beam_width=4)
    directories = {tp_size: tmp_path_factory.mktemp("engines") / f"tp{tp_size}" for tp_size in (1, 2)}
    for tp_size, directory in directories.items():
        world = 2 * tp_size
        with EngineWriter(directory) as writer:
            for rank in range(world):
                mapping = Mapping(world_size=world, rank=rank, tp_size=tp_size, pp_size=2)
                model = get_model_class(LLAMA[0]).from_hugging_face(hf_dir(*LLAMA), mapping=mapping)
                engine = Engine.from_model(model, config)
                writer.add_rank(rank, engine.spec, engine.weights(rank))
    return directories


@pytest.mark.parametrize("tp_size", [1, 2])
def test_tokens_are_those_of_transformers(engines: dict[int, Path], tp_size: int) -> None:
    with GenerationExecutor.create(engines[tp_size], KvCacheConfig(max_tokens=512)) as executor:
        results = [executor.generate_async(ids, greedy(12)) for ids in PROMPTS]
        beams = executor.generate_async(PROMPTS[1], greedy(8, n=3, use_beam_search=True))
        scored = executor.generate_async(PROMPTS[3], greedy(4, prompt_logprobs=0))
        assert [r.result(120).outputs[0].token_ids for r in results] == [hf_greedy(ids, 12) for ids in PROMPTS]
        assert [o.token_ids for o in beams.result(60).outputs] == hf_beams(PROMPTS[1], 8, 3)
        assert scored.result(60).outputs[0].token_ids == hf_greedy(PROMPTS[3], 4)
        got = [(entry or {})[token].logprob for entry, token in zip(scored.prompt_logprobs[1:], PROMPTS[3][1:])]
        want = hf_logprobs(PROMPTS[3])[range(len(got)), PROMPTS[3][1:]]
        torch.testing.assert_close(torch.tensor(got), want, atol=1e-4, rtol=0)


def test_a_killed_stage_fails_every_request_with_its_name(engines: dict[int, Path]) -> None:
    with GenerationExecutor.create(engines[1], KvCacheConfig(max_tokens=512)) as executor:
        assert executor.generate(PROMPTS[0], greedy(2)).outputs[0].token_ids == hf_greedy(PROMPTS[0], 2)
        (worker,) = children()
        os.kill(worker, signal.SIGSTOP)  # so that nothing ends before it is killed
        results = [executor.generate_async(ids, greedy(40)) for ids in PROMPTS]
        os.kill(worker, signal.SIGKILL)
        for result in results:
            with pytest.raises(EngineDeadError, match=r"rank 1 .*SIGKILL"):
                result.result(5)
    assert not children()
