"""Real models cut into stages, a thread per rank: the tokens of one rank in float32, and work in flight."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Iterator

import pytest
from tests.support.executors import LLAMA, MISTRAL, bench, greedy, hf_beams, hf_greedy, hf_logprobs, prompt
from tests.support.rank_threads import staged
from tests.support.tiny_base import BASE
from tests.support.tiny_models import TINY

from lamella_core.errors import EngineDeadError
from lamella_core.mapping import Mapping
from lamella_executor import RequestStatus

FIVE_LAYERS = ("LlamaForCausalLM", "five_layers")
TIED = ("GPT2LMHeadModel", "tied")
LENGTHS = (3, 17, 1, 30, 9, 8, 23, 4)
PROMPTS = [prompt(n) for n in LENGTHS]
TWO = Mapping(world_size=2, pp_size=2)
FOUR = Mapping(world_size=4, tp_size=2, pp_size=2)
UNEVEN = Mapping(world_size=3, pp_size=3)  # two layers, two, one
CHOSEN = Mapping(world_size=3, pp_size=3, pp_partition=(1, 3, 1))


def name(parameter: object) -> str:
    """A test's id."""
    if not isinstance(parameter, Mapping):
        return "-".join(parameter) if isinstance(parameter, tuple) else str(parameter)
    partition = "" if parameter.pp_partition is None else "".join(map(str, parameter.pp_partition))
    return f"tp{parameter.tp_size}pp{parameter.pp_size}{partition}"


@pytest.fixture(autouse=True, scope="module")
def five_layers() -> Iterator[None]:
    """A model deep enough for stages of several sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY[FIVE_LAYERS[0]], FIVE_LAYERS[1], {**BASE, "num_hidden_layers": 5})
        yield


@pytest.mark.parametrize(
    ("mapping", "model"),
    [
        (TWO, LLAMA),
        (TWO, ("LlamaForCausalLM", "biased_tied")),
        (TWO, TIED),
        (TWO, ("BloomForCausalLM", "six_heads")),
        (TWO, ("MixtralForCausalLM", "top2")),
        (UNEVEN, FIVE_LAYERS),
        (CHOSEN, FIVE_LAYERS),
        (FOUR, LLAMA),
        (FOUR, ("LlamaForCausalLM", "biased_tied")),
        (FOUR, MISTRAL),
    ],
    ids=name,
)
def test_greedy_tokens_are_those_of_transformers(mapping: Mapping, model: tuple[str, str]) -> None:
    with staged(mapping, model, max_num_tokens=16) as (it, leader):
        results = it.executor.generate(PROMPTS, greedy(12))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(ids, 12, model) for ids in PROMPTS]
        assert it.idle_blocks() == (0, 0)
        assert max(leader.depths) == mapping.pp_size - 1 and sum(leader.depths) > len(leader.depths) / 2


@pytest.mark.parametrize(
    ("mapping", "policy"),
    [
        (TWO, "GUARANTEED_NO_EVICT"),
        (TWO, "PREDICTED_PEAK"),
        (TWO, "STATIC_BATCH"),
        (TWO, "MAX_UTILIZATION"),
        (FOUR, "MAX_UTILIZATION"),
    ],
    ids=name,
)
def test_a_small_cache_changes_nothing(mapping: Mapping, policy: str) -> None:
    with staged(mapping, LLAMA, num_tokens=64, max_num_tokens=12, policy=policy) as (it, _):
        results = it.executor.generate(PROMPTS, greedy(20))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(ids, 20) for ids in PROMPTS]
        assert it.idle_blocks() == (0, 0)


@pytest.mark.parametrize("mapping", [UNEVEN, FOUR], ids=name)
def test_what_the_host_samples(mapping: Mapping) -> None:
    """Beams, prompt log-probabilities and samples, side by side; the samples are those of one rank."""
    model, ids = FIVE_LAYERS if mapping is UNEVEN else LLAMA, prompt(9)
    params = greedy(10, n=3, temperature=1.0, seed=7, logprobs=0)
    with bench(model) as one:
        alone = one.executor.generate(ids, params)
    with staged(mapping, model, max_num_tokens=6) as (it, _):
        plain = [it.executor.generate_async(ids, greedy(16)) for _ in range(2)]
        beams = it.executor.generate_async(prompt(17), greedy(8, n=4, use_beam_search=True))
        scored = it.executor.generate_async(prompt(17), greedy(8, prompt_logprobs=0))
        samples = it.executor.generate_async(ids, params)
        assert [o.token_ids for o in beams.result(60).outputs] == hf_beams(prompt(17), 8, 4, model)
        assert [o.token_ids for o in samples.result(60).outputs] == [o.token_ids for o in alone.outputs]
        assert all(result.result(60).outputs[0].token_ids == hf_greedy(ids, 16, model) for result in plain)
        assert scored.result(60).outputs[0].token_ids == hf_greedy(prompt(17), 8, model)
        want = hf_logprobs(prompt(17), model)
        for position, token in enumerate(prompt(17)[1:]):
            got = (scored.prompt_logprobs or [])[position + 1]
            assert got is not None and got[token].logprob == pytest.approx(want[position, token].item(), abs=1e-4)
        assert it.idle_blocks() == (0, 0)


def test_a_prefix_is_found_on_every_stage() -> None:
    ids = prompt(30)
    with staged(CHOSEN, FIVE_LAYERS) as (it, leader):
        results = [it.executor.generate_async([*ids, 5], greedy(8))]
        while not leader.num_launched:
            time.sleep(0.001)
        results += [it.executor.generate_async([*ids, last], greedy(8)) for last in (6, 7)]
        for last, result in zip((5, 6, 7), results):
            assert result.result(60).outputs[0].token_ids == hf_greedy([*ids, last], 8, FIVE_LAYERS)
        again = it.executor.generate([*ids, 8], greedy(8))
        assert again.outputs[0].token_ids == hf_greedy([*ids, 8], 8, FIVE_LAYERS)
        assert again.metrics is not None and again.metrics.num_reused_tokens >= 28
        assert [r.metrics.num_reused_tokens for r in results if r.metrics is not None] == [0, 28, 28]


@pytest.mark.parametrize("mapping", [TWO, FOUR], ids=name)
def test_requests_aborted_at_random_leave_no_block(mapping: Mapping) -> None:
    rng = random.Random(2)
    with staged(mapping, LLAMA, num_tokens=256) as (it, _):
        results = []
        for _ in range(60):
            ids = prompt(rng.randrange(1, 30), seed=rng.randrange(4))
            kind = rng.choice([{}, {}, {"temperature": 1.0}, {"temperature": 1.0, "n": 2}, {"logprobs": 0}])
            results.append(it.executor.generate_async(ids, greedy(rng.randrange(1, 12), **kind), rng.random() < 0.5))
            if rng.random() < 0.4:
                rng.choice(results[-6:]).abort()
        for result in results:
            assert result.result(120).status in (RequestStatus.FINISHED, RequestStatus.CANCELLED)
            if result.status is RequestStatus.FINISHED and result.params == greedy(result.params.max_tokens):
                want = hf_greedy(result.prompt_token_ids, 12)[: result.params.max_tokens]
                assert result.outputs[0].token_ids == want
        assert it.idle_blocks() == (0, 0)


class Held:
    """In place of a rank's queue of orders: keeps them until they are let go."""

    def __init__(self, orders: queue.Queue[bytes | None]) -> None:
        self._orders, self.kept = orders, queue.Queue[bytes | None]()

    def put(self, order: bytes | None) -> None:
        self.kept.put(order)

    def let_go(self) -> None:
        self.put = self._orders.put  # type: ignore[method-assign]
        while not self.kept.empty():
            self._orders.put(self.kept.get())


@pytest.mark.parametrize("event", ["shut down", "aborted"])
def test_an_end_with_steps_in_flight(event: str) -> None:
    """A pipeline that loses a rank raises; it does not hang."""
    with staged(TWO, LLAMA, breaks=event == "aborted") as (it, leader):
        results = [it.executor.generate_async(ids, greedy(100)) for ids in PROMPTS[:4]]
        while leader.num_launched < 6:
            time.sleep(0.001)
        if event == "shut down":
            it.executor.shutdown()
        else:  # the other rank has a step before it, and so must notice
            held = Held(leader.orders[0])
            leader.orders[0] = held  # type: ignore[call-overload]
            while held.kept.empty():
                time.sleep(0.001)
            leader.inner._links._groups.abort()
            held.let_go()
        for result in results:
            with pytest.raises(EngineDeadError, match="shut down" if event == "shut down" else "CommunicationError"):
                result.result(10)
        assert not it.executor.is_alive
