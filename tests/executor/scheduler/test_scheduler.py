"""Named cases of the scheduler: capacity policies, fairness, budgets, and the field's known failures."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from tests.support import fake_engine
from tests.support.fake_engine import FakeEngine, Shape
from tests.support.fake_loop import FakeLoop

from lamella_core.errors import RequestError
from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.scheduler.policy import MAX_OPTIMISTIC_PAUSES

NO_EVICT = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
MAX_UTILIZATION = CapacitySchedulerPolicy.MAX_UTILIZATION
STATIC = CapacitySchedulerPolicy.STATIC_BATCH


@pytest.fixture
def no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence ends before max_tokens."""
    monkeypatch.setattr(fake_engine, "END", -1)


def greedy(max_tokens: int, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **fields)


def samples(width: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=width, temperature=1.0)


def beams(width: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=width, use_beam_search=True)


def prompt(number: int, length: int) -> list[int]:
    return [1 + (number * 13 + i * 7) % 49 for i in range(length)]


# capacity policies


def test_a_crowd_in_a_pool_for_one_does_not_thrash(no_end: None) -> None:
    """64 requests, a pool of 1.2 times one request: all end, each paused at most 4 times, little computed twice."""
    shape = Shape(num_blocks=12, tokens_per_block=4, max_batch_size=64, max_num_tokens=64, policy=MAX_UTILIZATION)
    engine = FakeEngine(shape)
    for number in range(64):
        engine.add(prompt(number, 8), greedy(33))  # 40 tokens: 10 blocks
    engine.run()
    engine.check_outputs()
    pauses = [request.num_pauses for request in engine.requests.values()]
    assert max(pauses) <= MAX_OPTIMISTIC_PAUSES <= 4
    assert sum(pauses) > 0
    assert 64 * 40 / engine.num_rows >= 0.6, "too much was computed twice"


def test_pauses_are_few_even_if_requests_widen(no_end: None) -> None:
    """Requests that look small when they start and fork into many sequences afterwards."""
    for seed in range(12):
        rng = random.Random(seed * 100)
        num_blocks, size = rng.choice([20, 26, 40, 60]), rng.choice([1, 2])
        shape = Shape(num_blocks, size, max_batch_size=32, max_num_tokens=rng.choice([16, 64]), policy=MAX_UTILIZATION)
        engine = FakeEngine(shape)
        for number in range(16):
            params = rng.choice([samples, beams])(rng.choice([2, 3, 4]), rng.randint(4, 14))
            with suppress(RequestError):
                engine.add(prompt(number, rng.randint(1, 4)), params)
        engine.run()
        engine.check_outputs()
        assert max(request.num_pauses for request in engine.requests.values()) <= MAX_OPTIMISTIC_PAUSES


@pytest.mark.parametrize("is_reused", [True, False])
@pytest.mark.parametrize("make", [samples, beams])
def test_paused_families_resume_sharing_their_prompt(no_end: None, make: object, is_reused: bool) -> None:
    shape = Shape(num_blocks=18, tokens_per_block=4, policy=MAX_UTILIZATION, is_reused=is_reused)
    engine = FakeEngine(shape)
    for number in range(4):
        engine.add(prompt(number, 22), make(4, 8))  # 5 shared blocks and 3 for each of 4; 32 without sharing
    engine.run()
    engine.check_outputs()
    assert any(request.num_pauses for request in engine.requests.values())


def test_a_paused_decode_leaves_the_plan(no_end: None) -> None:
    """A request that catches up after a pause takes blocks from a newer one whose token is planned already."""
    for seed in range(40):
        rng = random.Random(seed)
        shape = Shape(num_blocks=14, tokens_per_block=2, max_num_tokens=8, policy=MAX_UTILIZATION)
        engine = FakeEngine(shape)
        for number in range(10):
            width = rng.choice([1, 2, 3])
            engine.add(prompt(number, rng.randint(1, 5)), samples(width, rng.randint(4, 6)))
        engine.run()
        engine.check_outputs()


def test_no_evict_counts_idle_matches_as_taken(no_end: None) -> None:
    """A cached prefix that a new request takes is no longer free for the running one."""
    engine = FakeEngine(Shape(num_blocks=8, tokens_per_block=4, is_partially_reused=False))
    engine.add(prompt(1, 17), greedy(1))
    engine.run()  # leaves 4 cached blocks
    first = engine.add(prompt(2, 4), greedy(13))  # 4 blocks
    second = engine.add(prompt(1, 17), greedy(4))  # 5 blocks, 4 of them cached
    engine.step()
    assert [r.request_id for r in engine.scheduler.running] == [first]
    engine.run()
    assert engine.requests[second].num_reused_tokens > 0
    engine.check_outputs()


def test_beams_do_not_offer_what_they_may_drop(no_end: None) -> None:
    """Else another request could keep the blocks of a dropped beam, which the guarantee counts as given back."""
    engine = FakeEngine(Shape(num_blocks=24, tokens_per_block=2, max_num_tokens=32))
    first = engine.add(prompt(0, 4), beams(4, 10))
    for _ in range(6):
        engine.step()
    beam = engine.requests[first].sequences[0]
    assert beam.num_computed_tokens == 9
    second = engine.add([*beam.token_ids, 7], greedy(1))
    engine.run()
    engine.check_outputs()
    assert engine.requests[second].num_reused_tokens == 4  # the prompt's


def test_static_batches_do_not_mix(no_end: None) -> None:
    engine = FakeEngine(Shape(num_blocks=40, max_batch_size=3, max_num_tokens=8, policy=STATIC))
    ids = [engine.add(prompt(number, 6), greedy(3 + number)) for number in range(6)]
    seen: list[set[int]] = []
    while engine.scheduler.has_work:
        engine.step()
        running = {r.request_id for r in engine.scheduler.running}
        if running and (not seen or not running <= seen[-1]):
            seen.append(running | (seen.pop() if seen and seen[-1] & running else set()))
    assert seen == [set(ids[:3]), set(ids[3:])]
    engine.check_outputs()


# fairness


@pytest.mark.parametrize("policy", [NO_EVICT, MAX_UTILIZATION])
def test_one_huge_request_neither_blocks_nor_starves(no_end: None, policy: CapacitySchedulerPolicy) -> None:
    """A request for 90 % of the cache among an endless stream of small ones."""
    shape = Shape(num_blocks=40, tokens_per_block=4, max_batch_size=8, max_num_tokens=64, policy=policy)

    def waits(with_big: bool) -> tuple[list[int], int]:
        engine = FakeEngine(shape)
        arrivals: dict[int, int] = {}
        big = -1
        number = 0
        while number < 200:
            if with_big and number == 20:
                big = engine.add(prompt(99, 140), greedy(4))
                arrivals[big] = engine.num_steps
            arrivals[engine.add(prompt(number, 8), greedy(4))] = engine.num_steps
            number += 1
            engine.step()
        engine.run()
        engine.check_outputs()
        took = {i: engine.first_token_step[i] - arrivals[i] for i in arrivals}
        big_wait = took.pop(big, 0)
        return sorted(took.values()), big_wait

    alone, _ = waits(with_big=False)
    together, big_wait = waits(with_big=True)
    assert together[int(0.9 * len(together))] <= 3 * alone[int(0.9 * len(alone))]
    assert (
        together[-1] <= 4 + 3 + 4 + 2
    )  # steps: small ones drain, its prompt in three chunks, its output, and catching up
    assert big_wait <= 32 + 4 + 3  # four overtakes per slot at one a step, small ones drain, its prompt


def test_overtaking_is_bounded(no_end: None) -> None:
    engine = FakeEngine(Shape(num_blocks=10, tokens_per_block=4, max_batch_size=2, max_num_tokens=32))
    engine.add(prompt(0, 4), greedy(5))
    engine.step()
    big = engine.add(prompt(1, 30), greedy(11))  # all 10 blocks
    for number in range(2, 60):
        engine.add(prompt(number, 4), greedy(5))
    engine.run()
    before = [i for i, step in engine.first_token_step.items() if step < engine.first_token_step[big] and i > big]
    assert len(before) == 8  # 4 per slot
    engine.check_outputs()


def test_decode_tokens_are_never_left_out(no_end: None) -> None:
    """Requests are admitted only while the last tokens of all of them fit one step."""
    engine = FakeEngine(Shape(num_blocks=80, max_batch_size=8, max_num_tokens=10))
    ids = [engine.add(prompt(number, 3), beams(4, 6)) for number in range(5)]
    while engine.scheduler.has_work:
        ready = {r for r in engine.scheduler.running if r.sequences[0].num_output_tokens}
        plan = engine.step()
        assert ready <= {item.request for item in plan.items}
    engine.check_outputs()
    assert sorted(engine.outputs) == ids


def mixed_step(
    num_decoding: int, num_prompt_tokens: int, max_tokens: int = 20
) -> tuple[FakeEngine, list[int], StepPlan]:
    """Returns the engine, ids of requests that decode, oldest first, and a step with the prompt of another."""
    engine = FakeEngine(Shape(num_blocks=400, max_batch_size=64, max_num_tokens=64, is_reused=False, row_tile=8))
    ids = [engine.add(prompt(number, 2), greedy(20)) for number in range(num_decoding)]
    engine.step()
    engine.add(prompt(99, num_prompt_tokens), greedy(max_tokens))
    return engine, ids, engine.step()


def test_a_step_with_prompts_leaves_out_the_newest_for_a_whole_tile(no_end: None) -> None:
    engine, ids, plan = mixed_step(24, 11)  # 35 rows: 3 more than 4 tiles, an eighth of those that decode
    assert plan.num_tokens == 32
    assert [item.request.request_id for item in plan.items] == [*ids[:21], 24]
    assert engine.step().num_tokens == 25  # nobody is left out where there are no prompts
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize(("num_decoding", "num_prompt_tokens"), [(24, 12), (24, 13), (16, 19), (24, 3), (24, 8)])
def test_nobody_is_left_out_where_it_does_not_pay(num_decoding: int, num_prompt_tokens: int, no_end: None) -> None:
    """Too many of those that decode, most of a tile's rows, too small a step, or whole tiles already."""
    _, _, plan = mixed_step(num_decoding, num_prompt_tokens)
    assert plan.num_tokens == num_decoding + num_prompt_tokens


def test_requests_are_left_out_in_turn(no_end: None) -> None:
    """Prompts of 11 tokens that end with one more: every step has 35 rows, and nobody else begins to decode."""
    engine, ids, plan = mixed_step(24, 11, max_tokens=1)
    lefts = [set(ids) - {item.request.request_id for item in plan.items}]
    for number in range(100, 108):
        engine.add(prompt(number, 11), greedy(1))
        lefts.append(set(ids) - {item.request.request_id for item in engine.step().items})
    assert [len(left) for left in lefts] == [3] * 9
    assert set().union(*lefts[:8]) == set(ids)
    assert lefts[8] == lefts[0]


def test_nobody_is_left_out_of_micro_batches() -> None:
    """Some 24 of 48 decode in each, beside a prompt of 10 tokens: a row or three more than 4 tiles."""
    loop = FakeLoop(Shape(1000, max_batch_size=64, max_num_tokens=64, is_reused=False, row_tile=8), num_batches=2)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    decoding = [loop.submit([1 + number % 20, 2], params).request_id for number in range(48)]
    for _ in range(40):
        loop.submit([3] * 10, params.replace(max_tokens=1))
        loop.step()
    assert min(loop.requests[number].sequences[0].num_output_tokens for number in decoding) >= 15
    loop.run()


def test_decode_comes_before_chunks(no_end: None) -> None:
    engine = FakeEngine(Shape(num_blocks=40, max_num_tokens=8))
    engine.add(prompt(0, 4), greedy(10))
    engine.step()
    engine.add(prompt(1, 30), greedy(2))
    for start in (0, 7, 14, 21):
        plan = engine.step()
        assert [(item.start, item.num_tokens, item.num_logits) for item in plan.items][1] == (start, 7, 0)
        assert plan.items[0].num_tokens == plan.items[0].num_logits == 1


def test_unchunked_prompts_are_whole(no_end: None) -> None:
    engine = FakeEngine(Shape(num_blocks=40, max_num_tokens=8, is_chunked=False))
    engine.add(prompt(0, 6), greedy(4))
    engine.add(prompt(1, 6), greedy(4))
    assert [item.num_tokens for item in engine.step().items] == [6]
    assert [item.num_tokens for item in engine.step().items] == [1, 6]
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("policy", list(CapacitySchedulerPolicy))
@pytest.mark.parametrize("max_num_tokens", [1, 5, 64])
def test_prompt_logprobs_get_every_row(policy: CapacitySchedulerPolicy, max_num_tokens: int, no_end: None) -> None:
    shape = Shape(num_blocks=10, tokens_per_block=4, max_num_tokens=max_num_tokens, policy=policy)
    engine = FakeEngine(shape)
    for number in range(6):  # the same prompt: it is cached, yet its rows are computed
        engine.add(prompt(number // 3, 12), greedy(6, prompt_logprobs=0))
    engine.run()
    engine.check_outputs()
    assert len(engine.outputs) == 6
    assert engine.requests[0].num_reused_tokens == engine.requests[5].num_reused_tokens == 0


# known failures


def test_disconnects_leak_no_blocks() -> None:
    """Half of 2,000 requests vanish at a random step; at every idle point nothing is live and the gauges add up."""
    rng = random.Random(5)
    shape = Shape(num_blocks=24, max_batch_size=8, max_num_tokens=32, policy=MAX_UTILIZATION)
    engine = FakeEngine(shape)
    for batch in range(40):
        ids = []
        for _ in range(50):
            number = rng.randrange(30)
            params = samples(rng.choice([1, 1, 1, 3]), rng.randint(1, 10))
            ids.append(engine.add(prompt(number, rng.randint(1, 20)), params))
        doomed = rng.sample(ids, 25)
        while engine.scheduler.has_work:
            engine.step()
            for _ in range(rng.randrange(4)):
                if doomed:
                    engine.abort(doomed.pop())
        stats = engine.kv.stats()
        assert stats.num_live == 0 and stats.num_cached + stats.num_free == stats.num_total, batch
    engine.check_outputs()


def test_a_pool_full_of_cached_prefixes_serves_at_once(no_end: None) -> None:
    engine = FakeEngine(Shape(num_blocks=32, tokens_per_block=4, max_batch_size=32, max_num_tokens=128))
    for number in range(8):
        engine.add(prompt(number, 16), greedy(1))
        engine.run()
    stats = engine.kv.stats()
    assert (stats.num_live, stats.num_free) == (0, 0), "the pool is not full of cached blocks"
    ids = [engine.add([100 + number] * 3, greedy(2)) for number in range(32)]
    start = engine.num_steps
    engine.run()
    engine.check_outputs()
    assert all(engine.first_token_step[i] == start + 1 for i in ids)


def test_reuse_is_counted_and_saves_rows(no_end: None) -> None:
    engine = FakeEngine(Shape(num_blocks=32, tokens_per_block=4, max_num_tokens=64))
    first = engine.add(prompt(1, 18), greedy(2))
    engine.run()
    rows = engine.num_rows
    second = engine.add([*prompt(1, 14), 60, 61, 62], greedy(2))
    engine.run()
    assert engine.requests[first].num_reused_tokens == 0
    assert engine.requests[second].num_reused_tokens == 14  # three whole blocks and half of a copied one
    assert engine.num_rows - rows == 4
    assert engine.kv.stats().num_reused_tokens == 14
    engine.check_outputs()


def test_a_failed_step_is_not_reused(no_end: None) -> None:
    engine = FakeEngine(Shape(num_blocks=32, tokens_per_block=4, max_num_tokens=8))
    first = engine.add(prompt(1, 20), greedy(2))
    engine.step()
    engine.step(failing={first})
    assert engine.kv.stats().num_cached == 0 and not engine.scheduler.has_work
    second = engine.add(prompt(1, 20), greedy(2))
    engine.run()
    assert engine.requests[second].num_reused_tokens == 0
    engine.check_outputs()


def test_ids_are_unique_and_unknown_aborts_are_harmless() -> None:
    engine = FakeEngine(Shape())
    request_id = engine.add([1, 2, 3], greedy(2))
    with pytest.raises(RequestError, match="already in use"):
        engine.scheduler.add(engine.requests[request_id])
    assert engine.scheduler.abort(12345) is None
    engine.run()
    assert engine.scheduler.abort(request_id) is None
    engine.scheduler.finish(engine.requests[request_id])
    engine.check_outputs()


@pytest.mark.parametrize(
    ("shape", "length", "params", "message"),
    [
        (Shape(num_blocks=4), 10, greedy(8), "5 KV cache blocks.*has 4 of 4 tokens; lower max_tokens"),
        (Shape(num_blocks=9), 9, samples(4, 8), "10 KV cache blocks"),
        (Shape(max_batch_size=2), 3, samples(3, 2), "3 sequences.*runs 2.*max_batch_size"),
        (Shape(), 3, SamplingParams(n=5, use_beam_search=True), "beam width is 5.*allows 4.*max_beam_width"),
        (Shape(max_num_tokens=2), 1, beams(3, 2), "3 sequences and a step 2 tokens.*max_num_tokens"),
        (Shape(max_num_tokens=8, is_chunked=False), 9, greedy(1), "9 tokens, a step 8; set.*enable_chunked_prefill"),
        (Shape(num_blocks=2, window=9), 40, greedy(8), "KV cache blocks"),
    ],
)
def test_impossible_requests_are_refused(shape: Shape, length: int, params: SamplingParams, message: str) -> None:
    engine = FakeEngine(shape)
    with pytest.raises(RequestError, match=message):
        engine.add(prompt(0, length), params)
    assert not engine.scheduler.has_work


@pytest.mark.parametrize("policy", list(CapacitySchedulerPolicy))
@pytest.mark.parametrize("params", [greedy(8), samples(3, 6), beams(4, 5), greedy(1), samples(4, 1)])
def test_whatever_fits_alone_runs_alone(policy: CapacitySchedulerPolicy, params: SamplingParams, no_end: None) -> None:
    """In the smallest pool that accepts it, also when that pool is full of cached blocks, its own prefix among them."""
    num_blocks = 1
    while True:
        engine = FakeEngine(Shape(num_blocks=num_blocks, tokens_per_block=4, policy=policy))
        try:
            engine.add(prompt(0, 11), params)
            break
        except RequestError:
            num_blocks += 1
    engine.run()
    for variant in range(6):
        engine.add([*prompt(0, 2 * variant), *prompt(7 + variant, 11 - 2 * variant)], params)
        engine.run()
    engine.check_outputs()


def test_a_window_bounds_the_blocks_of_a_long_prompt(no_end: None) -> None:
    shape = Shape(num_blocks=8, tokens_per_block=4, max_num_tokens=64, window=9, num_sinks=4)
    engine = FakeEngine(shape)
    ids = [engine.add(prompt(number, 100), greedy(20)) for number in range(3)]
    engine.run()
    engine.check_outputs()
    assert sorted(engine.outputs) == ids
