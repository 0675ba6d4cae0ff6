"""Drives a launching runner over made-up requests: chunked prompts, then decoding, one step ahead of itself or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tests.support.executors import LLAMA, tiny_model

from lamella_executor.admission import EngineLimits
from lamella_executor.attention.backend import HostLengths
from lamella_executor.attention.paged_cpu import layer_windows
from lamella_executor.config import KvCacheConfig
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.memory import KvCacheDemand
from lamella_executor.runner.cuda.batch import StepInputs
from lamella_executor.runner.cuda.graphs import CapturedStep
from lamella_executor.runner.cuda.start import start_runner
from lamella_executor.runner.setup import RunnerSetup
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import PENDING_TOKEN, RequestState
from lamella_executor.sequence import Sequence as TokenSequence

BLOCK = 4
NUM_BLOCKS = 64


def runner_setup(
    model: Any = None, *, max_batch_size: int = 6, max_num_tokens: int = 32, max_seq_len: int = 64, **kv: Any
) -> RunnerSetup:
    model = tiny_model(*LLAMA) if model is None else model
    model.set_max_seq_len(max_seq_len)
    specs = model.attention_specs()
    limits = EngineLimits(
        vocab_size=model.config.vocab_size,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_beam_width=1,
        max_input_len=max_seq_len,
        eos_token_ids=(),
        prefix_rule=model.config.prefix_rule,
    )
    config = KvCacheConfig(**{"max_tokens": NUM_BLOCKS * BLOCK, **kv})
    demand = KvCacheDemand(max_batch_size, max_seq_len)
    return RunnerSetup(model, specs, layer_windows(specs, None, 0), BLOCK, limits, config, demand)


def cpu_runner(**options: Any) -> Any:
    """A CUDA runner whose device is the CPU: everything but captured steps."""
    return start_runner(runner_setup(**options), "torch", "cpu")[0]


def request_of(
    prompt: Sequence[int], params: SamplingParams | None = None, request_id: int = 0, seed: int = 0
) -> RequestState:
    sequence = TokenSequence(0, list(prompt), len(prompt))
    return RequestState(request_id, params or SamplingParams(), seed, None, 64, [sequence], 0.0)


class Drive:
    """Requests on their way through a runner; each has one sequence.

    Args:
        runner: what launches.
        requests: all start at once.
        chunk: tokens of one prompt per step.
        device: of the caches.
    """

    def __init__(self, runner: Any, requests: list[RequestState], chunk: int = 64) -> None:
        self.runner = runner
        self.requests = requests
        self.chunk = chunk
        self.kv = KvCacheManager(NUM_BLOCKS, BLOCK, enable_block_reuse=False, enable_partial_reuse=False)

    def plan(self) -> StepPlan:
        """Decoding requests first, then chunks of prompts."""
        items = []
        for request in self.requests:
            sequence = request.sequences[0]
            start = sequence.num_computed_tokens
            count = min(self.chunk, sequence.num_tokens - start)
            assert self.kv.allocate(sequence, start + count)
            is_last = start + count == sequence.num_tokens
            items.append(ScheduledSequence(request, sequence, start, count, int(is_last)))
        items.sort(key=lambda item: item.num_tokens != 1)
        return StepPlan(items, self.kv.take_copies())

    def advance(self, plan: StepPlan) -> list[TokenSequence]:
        """Records a launched plan; returns the sampled sequences, each with a pending token."""
        sampled = []
        for item in plan.items:
            item.sequence.num_computed_tokens = item.end
            if item.is_sampled:
                item.sequence.token_ids.append(PENDING_TOKEN)
                sampled.append(item.sequence)
        return sampled

    def steps(self, *, ahead: bool) -> Iterator[None]:
        """Runs steps for ever; with ``ahead`` each is launched before the last one's tokens are known."""
        before: tuple[Any, list[TokenSequence]] | None = None
        while True:
            plan = self.plan()
            step = self.runner.launch(plan)
            sampled = self.advance(plan)
            if before is not None:
                _fill(*before, behind=2)
            before = (step, sampled)
            if not ahead:
                _fill(step, sampled, behind=1)
                before = None
            yield

    def generate(self, num_tokens: int, *, ahead: bool = False) -> list[list[int]]:
        """Returns the first ``num_tokens`` generated tokens of each request."""
        for _ in self.steps(ahead=ahead):
            known = [r.sequences[0] for r in self.requests]
            if all(s.num_output_tokens > num_tokens for s in known):
                return [s.output_ids[:num_tokens] for s in known]
        raise AssertionError


def _fill(step: Any, sampled: list[TokenSequence], *, behind: int) -> None:
    """Puts a step's tokens where they were pending, at most ``behind`` places from the end."""
    tokens = step.collect()
    assert len(tokens) == len(sampled)
    for sequence, token in zip(sampled, tokens):
        place = sequence.token_ids.index(PENDING_TOKEN)
        assert place >= sequence.num_tokens - behind
        sequence.token_ids[place] = token


def float32_engine_logits(runner: Any, ids: list[int]) -> torch.Tensor:
    """All logits of one prompt in one step, [len(ids), vocab_size]."""
    request = request_of(ids)
    request.sequences[0].blocks = list(range(-(-len(ids) // BLOCK)))
    return runner.run(StepPlan([ScheduledSequence(request, request.sequences[0], 0, len(ids), len(ids))]))


@dataclass
class Replay:
    """In place of a CUDA graph: runs what would have been recorded, on what is in the buffers now."""

    function: Any

    def replay(self) -> None:
        self.function()


def pretend_captured(runner: Any, sizes: tuple[int, ...]) -> list[int]:
    """Gives a runner "graphs" of these sizes; returns the list of the sizes that are replayed."""
    replayed: list[int] = []

    def captured(size: int) -> CapturedStep:
        inputs = runner.inputs(size)
        hidden = torch.zeros(size, runner._model.config.hidden_size)

        def forward() -> None:
            replayed.append(size)
            hidden.copy_(runner.forward(_with_lengths(inputs)))

        sample = {
            is_greedy: Replay(lambda g=is_greedy: runner.sample(hidden, inputs, is_greedy=g))
            for is_greedy in (True, False)
        }
        return CapturedStep(size, hidden, Replay(forward), sample)

    runner._graphs._steps = {size: captured(size) for size in sizes}
    runner._graphs._sizes = sorted(sizes)
    return replayed


def _with_lengths(inputs: StepInputs) -> StepInputs:
    contexts = inputs.attention.context_lens.numpy()
    return replace(inputs, attention=replace(inputs.attention, host=HostLengths(contexts, np.ones_like(contexts))))
