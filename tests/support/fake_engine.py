"""A scheduler and KV manager driven by a fake model, with the KV contents simulated and every step checked.

The fake model's next token is a pure function of the tokens before it, so outputs can be compared with a straight-line
model. What the forward writes per position is a digest of all tokens up to it, chained through what it *reads* from the
simulated cache: a wrong block table, copy, share or eviction shows up at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.kv_cache import KvCacheManager
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.sequence import EVICTED_BLOCK, RequestState, Sequence

PAUSING = (CapacitySchedulerPolicy.MAX_UTILIZATION, CapacitySchedulerPolicy.PREDICTED_PEAK)
VOCAB = 50
END = 0


def draw(*parts: object) -> int:
    """A pure pseudo-random number."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "little")


def next_token(tokens: list[int], seed: int, index: int) -> int:
    return draw("token", tuple(tokens), seed, index) % VOCAB


def next_beams(beams: list[list[int]], width: int, seed: int) -> list[tuple[int, int]]:
    """(parent, token) per new beam; parents repeat and drop out at random."""
    picks = [draw("beam", tuple(map(tuple, beams)), seed, i) for i in range(width)]
    return sorted((pick % len(beams), 1 + pick // 64 % (VOCAB - 1)) for pick in picks)


def expected_outputs(prompt: list[int], params: SamplingParams, seed: int) -> list[list[int]]:
    """The straight-line model: no cache, no batch."""
    if params.use_beam_search:
        beams = [list(prompt)]
        for _ in range(params.max_tokens):
            beams = [beams[parent] + [token] for parent, token in next_beams(beams, params.width, seed)]
        return [beam[len(prompt) :] for beam in beams]
    outputs = []
    for index in range(params.width):
        tokens = list(prompt)
        while len(tokens) - len(prompt) < params.max_tokens and (len(tokens) == len(prompt) or tokens[-1] != END):
            tokens.append(next_token(tokens, seed, index))
        outputs.append(tokens[len(prompt) :])
    return outputs


@dataclass(frozen=True)
class Shape:
    """One engine configuration."""

    num_blocks: int = 16
    tokens_per_block: int = 4
    max_batch_size: int = 8
    max_num_tokens: int = 16
    policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    is_chunked: bool = True
    is_reused: bool = True
    is_partially_reused: bool = True
    window: int | None = None
    num_sinks: int = 0
    max_beam_width: int = 4
    row_tile: int = 1
    has_states: bool = False  # sequences have recurrent states beside their blocks

    @property
    def num_state_slots(self) -> int:
        return min(self.max_batch_size * self.max_beam_width, self.max_num_tokens) if self.has_states else 0


def make_request(request_id: int, prompt: list[int], params: SamplingParams) -> RequestState:
    sequence = Sequence(index=0, token_ids=list(prompt), num_prompt_tokens=len(prompt))
    return RequestState(request_id, params, draw("seed", request_id), END, params.max_tokens, [sequence], 0.0)


class FakeEngine:
    """The loop's part: schedule, forward, sample, update; everything it sees is checked."""

    def __init__(self, shape: Shape) -> None:
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
            row_tile=shape.row_tile,
        )
        self.contents: list[list[int | None]] = [[None] * shape.tokens_per_block for _ in range(shape.num_blocks)]
        self.requests: dict[int, RequestState] = {}
        self.prompts: dict[int, list[int]] = {}
        self.outputs: dict[int, list[list[int]]] = {}  # of requests that ended well
        self.ended: list[int] = []
        self.num_steps = 0
        self.num_rows = 0
        self.first_token_step: dict[int, int] = {}

    # requests

    def add(self, prompt: list[int], params: SamplingParams) -> int:
        request = make_request(len(self.requests), prompt, params)
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.prompts[request.request_id] = list(prompt)
        return request.request_id

    def abort(self, request_id: int) -> None:
        request = self.scheduler.abort(request_id)
        if request is not None:
            self.ended.append(request_id)
        self.check_books()

    def fail(self, request: RequestState) -> None:
        self.scheduler.finish(request, cache=False)
        self.ended.append(request.request_id)

    def run(self, max_steps: int = 20_000) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.num_steps < max_steps, "the engine does not come to an end"
        assert self.kv.stats().num_live == 0

    # one step

    def step(self, failing: set[int] | None = None) -> StepPlan:
        ready = [
            r for r in self.scheduler.running if all(s.num_computed_tokens + 1 == s.num_tokens for s in r.sequences)
        ]
        plan = self.scheduler.schedule()
        if self.shape.policy not in PAUSING:
            left = set(ready) - {item.request for item in plan.items}
            fills_tiles = len(left) <= self.shape.row_tile // 2 and plan.num_tokens % self.shape.row_tile == 0
            assert not left or fills_tiles, "a guaranteed request was short of blocks"
        self.num_steps += 1
        self.num_rows += plan.num_tokens
        self.check_plan(plan)
        self.forward(plan)
        sampled = {item.request for item in plan.items if item.is_sampled}
        self.take_prompt_logprobs(plan)
        for request in list(dict.fromkeys(item.request for item in plan.items)):
            if failing and request.request_id in failing:
                self.fail(request)
                sampled.discard(request)
        self.scheduler.advance(plan)
        for request in sorted(sampled, key=lambda r: r.request_id):
            self.first_token_step.setdefault(request.request_id, self.num_steps)
            self.sample(request)
        self.check_books()
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        shape = self.shape
        assert plan.items or not self.scheduler.has_work, "work waits but the step is empty"
        assert plan.num_tokens <= shape.max_num_tokens
        requests = {item.request for item in plan.items}
        assert sum(request.slots for request in requests) <= shape.max_batch_size
        assert sum(request.slots for request in self.scheduler.running) <= shape.max_batch_size
        assert len({item.sequence for item in plan.items}) == len(plan.items)
        for item in plan.items:
            assert item.num_tokens > 0 and item.start == item.sequence.num_computed_tokens
            assert item.sequence in item.request.sequences
            assert item.end <= item.sequence.num_tokens
            is_first = item.sequence.num_output_tokens == 0
            if not shape.is_chunked and is_first:
                assert item.is_sampled, "a prompt was chunked"
        for request in requests:
            sampled = [item.sequence for item in plan.items if item.request is request and item.is_sampled]
            assert not sampled or sampled == request.sequences, "the lockstep is broken"
        if shape.policy not in PAUSING:
            assert not plan.paused

    def forward(self, plan: StepPlan) -> None:
        sources = {source for source, _ in plan.block_copies}
        destinations = [destination for _, destination in plan.block_copies]
        assert len(set(destinations)) == len(destinations) and not sources & set(destinations)
        for source, destination in reversed(plan.block_copies):
            self.contents[destination] = list(self.contents[source])
        written: dict[tuple[int, int], int] = {}
        for item in plan.items:
            for position in range(item.start, item.end):
                block, offset = self.place(item.sequence, position)
                value = self.truth(item.sequence, position)
                assert (block, offset) not in written, "two sequences write the same place"
                written[block, offset] = value
                self.contents[block][offset] = value
        for item in plan.items:
            self.check_reads(item.sequence, item.start, item.end)

    def check_reads(self, sequence: Sequence, start: int, end: int) -> None:
        """Everything that the queries at [start, end) can see holds the right token at the right position."""
        window = self.shape.window or end
        visible = set(range(max(start - window + 1, 0), end)) | set(range(min(self.shape.num_sinks, end)))
        for position in visible:
            block, offset = self.place(sequence, position)
            assert self.contents[block][offset] == self.truth(sequence, position), (
                f"position {position} of sequence {sequence.index} reads foreign contents in block {block}"
            )

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block = sequence.blocks[position // self.shape.tokens_per_block]
        assert block != EVICTED_BLOCK, f"position {position} was evicted but is still visible"
        return block, position % self.shape.tokens_per_block

    def truth(self, sequence: Sequence, position: int) -> int:
        return hash(tuple(sequence.token_ids[: position + 1]))

    def take_prompt_logprobs(self, plan: StepPlan) -> None:
        for item in plan.items:
            request, num_prompt = item.request, item.sequence.num_prompt_tokens
            assert item.num_logits in (0, 1, item.num_tokens)
            assert item.num_logits >= item.is_sampled
            if request.params.prompt_logprobs is None:
                continue
            done = request.prompt_logprobs
            if not done:
                done.append(None)
            for position in range(item.end - item.num_logits, item.end):
                if position + 1 == len(done) and position + 1 < num_prompt:
                    done.append({})
            assert len(done) >= min(item.end + 1, num_prompt), "a prompt position got no logits"

    # sampling, as the loop does it

    def sample(self, request: RequestState) -> None:
        params, live = request.params, request.sequences
        tokens = [s.token_ids for s in live]
        if params.use_beam_search:
            continuations = next_beams(tokens, params.width, request.seed)
        elif live[0].num_output_tokens == 0 and not request.finished:
            continuations = [(0, next_token(tokens[0], request.seed, i)) for i in range(params.width)]
        else:
            continuations = [(i, next_token(s.token_ids, request.seed, s.index)) for i, s in enumerate(live)]
        self.apply(request, continuations)
        for sequence in list(request.sequences):
            is_long = sequence.num_output_tokens == params.max_tokens
            if is_long or (not params.use_beam_search and sequence.token_ids[-1] == END):
                request.sequences.remove(sequence)
                request.finished.append(sequence)
                self.kv.free(sequence)
        if not request.sequences:
            self.scheduler.finish(request)
            self.ended.append(request.request_id)
            self.outputs[request.request_id] = [s.output_ids for s in sorted(request.finished, key=lambda s: s.index)]

    def apply(self, request: RequestState, continuations: list[tuple[int, int]]) -> None:
        old, new, used = request.sequences, [], set()
        for i, (parent, _) in enumerate(continuations):
            if parent in used:
                child = old[parent].fork(i)
                self.kv.fork(old[parent], child)
                new.append(child)
            else:
                used.add(parent)
                new.append(old[parent])
        for i, sequence in enumerate(old):
            if i not in used:
                self.kv.free(sequence)
        is_renumbered = request.params.use_beam_search or len(new) > len(old)
        for i, (sequence, (_, token)) in enumerate(zip(new, continuations)):
            sequence.index = i if is_renumbered else sequence.index
            sequence.token_ids.append(token)
        request.sequences = new

    # books

    def check_books(self) -> None:
        live = [s for r in (*self.scheduler.running, *self.scheduler.waiting) for s in r.sequences]
        self.kv.check_invariants(live)
        stats = self.kv.stats()
        assert stats.num_live + stats.num_cached + stats.num_free == stats.num_total
        if not self.scheduler.has_work:
            assert stats.num_live == 0

    def check_outputs(self) -> None:
        """Every request ended exactly once, and the ones that ended well gave what the straight-line model gives."""
        assert sorted(self.ended) == sorted(self.requests)
        for request_id, outputs in self.outputs.items():
            request = self.requests[request_id]
            assert outputs == expected_outputs(self.prompts[request_id], request.params, request.seed)
            if request.params.prompt_logprobs is not None:
                assert len(request.prompt_logprobs) == request.num_prompt_tokens
