"""CUDA runners as pipeline stages, with the CPU for their device and a thread per rank: the tokens of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.executor.cuda.test_cuda_runner import pretend_captured
from tests.support.executors import BLOCK, LLAMA, MISTRAL, bench, greedy, hf_beams, hf_greedy, hf_logprobs, prompt
from tests.support.rank_threads import staged

from lamella_core.mapping import Mapping
from lamella_executor import SamplingParams
from lamella_executor.attention.paged_cpu import layer_windows
from lamella_executor.attention.paged_cuda import DeviceKvCache
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.pipeline import StageLinks
from lamella_executor.runner.cuda.runner import CudaRunner
from lamella_executor.runner.cuda.stage import CudaStageRunner, PipelineStage, Results
from lamella_executor.runner.cuda.start import choose_parts
from lamella_executor.runner.cuda.state import RunnerLimits
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import RequestState, Sequence

TWO = Mapping(world_size=2, pp_size=2)
FOUR = Mapping(world_size=4, tp_size=2, pp_size=2)
PROMPTS = [prompt(length, seed) for seed, length in enumerate((9, 1, 5, 13, 30, 17))]
SIZES = (1, 2, 6)


def cuda_stage(model: Any, groups: RankGroups, num_blocks: int) -> CudaStageRunner:
    """One rank's runner; decoding steps are padded as if they were captured."""
    device, specs = torch.device("cpu"), model.attention_specs()
    config, links, limits = model.config, StageLinks(groups), RunnerLimits(64, 64, 128)
    parts = choose_parts("torch", device, config.torch_dtype)
    cache = DeviceKvCache(specs, num_blocks, BLOCK, config.torch_dtype, device)
    stage = PipelineStage(links, 64, config.hidden_size, config.vocab_size, config.torch_dtype, device)
    runner = CudaRunner(model, cache, layer_windows(specs, None, 0), limits, parts, groups.tp, stage)
    pretend_captured(runner, SIZES)
    return CudaStageRunner(runner, links.num_stages)


@pytest.mark.parametrize(("mapping", "model"), [(TWO, LLAMA), (TWO, MISTRAL), (FOUR, LLAMA)])
def test_greedy_tokens_are_those_of_transformers(mapping: Mapping, model: tuple[str, str]) -> None:
    with staged(mapping, model, max_num_tokens=16, make=cuda_stage) as (it, leader):
        results = it.executor.generate(PROMPTS, greedy(12))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(ids, 12, model) for ids in PROMPTS]
        assert it.idle_blocks() == (0, 0)
        assert leader.is_sampling


def test_rows_for_the_host_beside_rows_for_the_device() -> None:
    random = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=5)
    with bench() as one:
        alone = [one.executor.generate(ids, random).outputs[0].token_ids for ids in PROMPTS]
    with staged(TWO, LLAMA, max_num_tokens=24, make=cuda_stage) as (it, _):
        drawn = [it.executor.generate_async(ids, random) for ids in PROMPTS]
        beams = it.executor.generate_async(PROMPTS[3], greedy(8, n=3, use_beam_search=True))
        scored = it.executor.generate_async(PROMPTS[5], greedy(8, prompt_logprobs=0))
        plain = it.executor.generate_async(PROMPTS[4], greedy(16))
        assert [result.result(60).outputs[0].token_ids for result in drawn] == alone
        assert [o.token_ids for o in beams.result(60).outputs] == hf_beams(PROMPTS[3], 8, 3)
        assert plain.result(60).outputs[0].token_ids == hf_greedy(PROMPTS[4], 16)
        assert scored.result(60).outputs[0].token_ids == hf_greedy(PROMPTS[5], 8)
        want = hf_logprobs(PROMPTS[5])
        for position, token in enumerate(PROMPTS[5][1:]):
            got = (scored.prompt_logprobs or [])[position + 1]
            assert got is not None and got[token].logprob == pytest.approx(want[position, token].item(), abs=1e-4)
        assert it.idle_blocks() == (0, 0)


def item(start: int, count: int, num_logits: int, *, is_host: bool = False) -> ScheduledSequence:
    params = SamplingParams(logprobs=0) if is_host else SamplingParams()
    sequence = Sequence(0, [1] * (start + count + (not num_logits)), 1)
    request = RequestState(1, params, 0, None, 9, [sequence], 0.0)
    return ScheduledSequence(request, sequence, start, count, num_logits)


@pytest.mark.parametrize(
    ("items", "results"),
    [
        ([item(4, 1, 1), item(5, 1, 1)], Results(2, [0, 1], [])),
        ([item(4, 1, 1), item(4, 1, 1, is_host=True), item(5, 1, 1)], Results(3, [0, 2], [1])),
        ([item(4, 1, 1, is_host=True)], Results(0, [], [0])),
        ([item(4, 1, 1), item(0, 3, 0), item(0, 3, 3, is_host=True), item(0, 2, 1)], Results(2, [0, 1], [1, 2, 3])),
        ([item(0, 3, 0)], Results(0, [], [])),
    ],
)
def test_both_ends_agree_on_what_is_sent(items: list[ScheduledSequence], results: Results) -> None:
    assert Results.of(StepPlan(items)) == results
