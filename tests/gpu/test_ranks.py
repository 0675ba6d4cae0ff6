"""Engines of two GPUs: the tokens of one, steps in flight and recorded, and a killed rank."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.support.tiny_models import hf_dir
from tests.support.worker_crews import children, wait_for

from lamella_core.engine import BuildConfig, Engine, EngineWriter
from lamella_core.errors import ConfigError, EngineDeadError
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")

MODELS = [("LlamaForCausalLM", "one_kv_head"), ("GPT2LMHeadModel", "tied"), ("MixtralForCausalLM", "top2")]
PARAMS = [
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, top_p=0.9, seed=7),
    SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.7, top_k=9, seed=8),
    SamplingParams(max_tokens=20, ignore_eos=True, n=2, temperature=1.0, seed=9),
    SamplingParams(max_tokens=20, ignore_eos=True, repetition_penalty=1.2, logprobs=1),
    SamplingParams(max_tokens=20, ignore_eos=True),
]


def write_engine(directory: Path, model: tuple[str, str], dtype: str = "float32", **sizes: int) -> Path:
    world = sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    with EngineWriter(directory) as writer:
        for rank in range(world):
            mapping = Mapping(world_size=world, rank=rank, **sizes)
            loaded = get_model_class(model[0]).from_hugging_face(hf_dir(*model), dtype, mapping, device="cuda")
            engine = Engine.from_model(loaded, BuildConfig(max_batch_size=8, max_num_tokens=64, device="cuda"))
            writer.add_rank(rank, engine.spec, engine.weights(rank))
    return directory


def open_engine(directory: Path) -> GenerationExecutor:
    return GenerationExecutor.create(directory, KvCacheConfig(max_tokens=4096))


def tokens(directory: Path, prompts: list[list[int]]) -> list[list[list[int]]]:
    with open_engine(directory) as executor:
        results = [executor.generate(prompts, PARAMS) for _ in range(2)]  # the second finds the first's blocks
        told = [[[o.token_ids for o in result.outputs] for result in each] for each in results]
    assert told[0] == told[1]
    return told[0]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[0])
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}, {"tp_size": 2, "moe_ep_size": 2}], ids=str)
def test_two_gpus_generate_the_tokens_of_one(model, sizes, prompts, tmp_path):
    if "moe_ep_size" in sizes and "Mixtral" not in model[0]:
        pytest.skip("has no experts")
    expected = tokens(write_engine(tmp_path / "one", model), prompts)
    assert tokens(write_engine(tmp_path / "two", model, **sizes), prompts) == expected


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_a_killed_rank_ends_the_engine_and_the_next_one_works(sizes, prompts, tmp_path):
    directory = write_engine(tmp_path / "engine", MODELS[0], "bfloat16", **sizes)
    with open_engine(directory) as executor:  # the libraries' code and workspaces stay in memory from here on
        before = [r.outputs[0].token_ids for r in executor.generate(prompts, PARAMS[0])]
    assert wait_for(lambda: not children())
    free = torch.cuda.mem_get_info(0)[0]
    with open_engine(directory) as executor:
        executor.generate(prompts, PARAMS[0])
        (worker,) = children()
        os.kill(worker, signal.SIGSTOP)  # so that this rank's GPU waits for the other's
        running = executor.generate_async(prompts[0], PARAMS[0])
        time.sleep(0.5)
        os.kill(worker, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"rank 1 .*was killed by signal 9 \(SIGKILL\) in phase prefill"):
            running.result(20)
        assert time.monotonic() - started < 5.0
    assert wait_for(lambda: not children())
    with open_engine(directory) as executor:
        assert [r.outputs[0].token_ids for r in executor.generate(prompts, PARAMS[0])] == before
    assert wait_for(lambda: free - torch.cuda.mem_get_info(0)[0] < 256 << 20)


def test_more_ranks_than_gpus(tmp_path):
    count = torch.cuda.device_count()
    directory = write_engine(tmp_path / "engine", MODELS[0], tp_size=4)
    if count >= 4:
        pytest.skip("has them all")
    with pytest.raises(ConfigError, match=rf"for 4 ranks .*has {count}\..*lamella-build --tp_size {count}"):
        open_engine(directory)
