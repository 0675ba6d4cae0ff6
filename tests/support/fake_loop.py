"""An engine loop over the fake device, driven step by step on the test's own thread."""

from __future__ import annotations

from typing import Any

from tests.support.fake_device import VOCAB, FakeCache, FakeDevice, FakeRunner
from tests.support.fake_engine import Shape
from tests.support.fake_pipeline import FakePipeline

from lamella_core.errors import EngineDeadError
from lamella_executor import GenerationResult, SamplingParams
from lamella_executor.admission import EngineLimits, make_request
from lamella_executor.kv_cache import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.mailbox import Mailbox, Submit
from lamella_executor.runner.base import PENDING_TOKEN
from lamella_executor.sampler import Sampler
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.sequence import RequestState, TextDecoder
from lamella_executor.stats import StatsBuffer

END = 0
MAX_SEQ_LEN = 200


class LetterDecoder:
    """One letter per token."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def push(self, token_id: int) -> None:
        self.text += chr(ord("a") + token_id)

    def finish(self) -> None: ...

    def fork(self) -> LetterDecoder:
        return LetterDecoder(self.text)


class FakeLoop:
    """A loop, its scheduler and KV manager, and the device they drive.

    Args:
        shape: sizes and policy.
        is_overlapped: steps run one ahead; else the same device computes each at once.
        num_batches: above 1, a pipeline with as many steps in flight.
        device: options of `FakeDevice`, `FakeRunner` or `FakePipeline`.
    """

    def __init__(self, shape: Shape, *, is_overlapped: bool = False, num_batches: int = 1, **device: Any) -> None:
        self.shape = shape
        self.kv = KvCacheManager(
            shape.num_blocks,
            shape.tokens_per_block,
            enable_block_reuse=shape.is_reused,
            enable_partial_reuse=shape.is_partially_reused,
            window=shape.window,
            num_sinks=shape.num_sinks,
            num_state_slots=shape.num_state_slots,
        )
        self.scheduler = Scheduler(
            self.kv,
            max_batch_size=shape.max_batch_size,
            max_num_tokens=shape.max_num_tokens,
            policy=shape.policy,
            enable_chunked_prefill=shape.is_chunked,
            max_beam_width=shape.max_beam_width,
            num_micro_batches=num_batches,
            row_tile=shape.row_tile,
        )
        cache = FakeCache(self.kv, shape.window, shape.num_sinks)
        if num_batches > 1:
            self.device: Any = FakePipeline(cache, max_in_flight=num_batches, **device)
        else:
            self.device = FakeDevice(cache, **device) if is_overlapped else FakeRunner(cache, **device)
        self.stats = StatsBuffer()
        self.loop = EngineLoop(self.device, self.scheduler, self.kv, Sampler(VOCAB), self.stats)
        self.limits = EngineLimits(
            VOCAB, MAX_SEQ_LEN, shape.max_batch_size, shape.max_num_tokens, shape.max_beam_width, eos_token_ids=(END,)
        )
        self.requests: dict[int, RequestState] = {}
        self.results: dict[int, GenerationResult] = {}
        self._mailbox = Mailbox()

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        seed: int = 1,
        streaming: bool = False,
        decoder: TextDecoder | None = None,
    ) -> GenerationResult:
        number = len(self.requests)
        params = params if params.seed is not None else params.replace(seed=seed)
        request = make_request(number, prompt, params, self.limits, decoder=decoder)
        result = GenerationResult(number, list(prompt), params, self._mailbox, streaming=streaming)
        self.loop.submit(Submit(request, result))
        self.requests[number], self.results[number] = request, result
        return result

    def abort(self, result: GenerationResult) -> None:
        self.loop.abort(result.request_id)
        self.check()

    def step(self) -> None:
        self.loop.step()
        self.check()

    def run(self, max_steps: int = 5_000) -> None:
        for _ in range(max_steps):
            if not self.loop.has_work:
                break
            self.step()
        assert not self.loop.has_work, "the loop does not come to an end"
        assert self.kv.stats().num_live == 0 and not self.scheduler.has_work

    def die(self, error: Exception) -> None:
        """What the engine's thread does when a step raises."""
        self.loop.fail_all(lambda: EngineDeadError(f"the engine stopped: {error}"))

    def check(self) -> None:
        """The books balance, and nobody is shown a token that is not known."""
        live = [s for r in self.requests.values() for s in r.sequences]
        self.kv.check_invariants(live)
        stats = self.kv.stats()
        assert stats.num_live + stats.num_cached + stats.num_free == stats.num_total
        for result in self.results.values():
            assert all(PENDING_TOKEN not in output.token_ids for output in result.outputs)


def told(result: GenerationResult) -> Any:
    """What a request ended with, comparable between loops."""
    if result.error is not None:
        return type(result.error), str(result.error)
    return result.status, result.outputs, result.prompt_logprobs
