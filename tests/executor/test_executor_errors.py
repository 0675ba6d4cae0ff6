"""Errors of a request, of a step and fatal ones; aborts; what streams show. Nobody else notices, no block is lost."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from tests.support.executors import LLAMA, Bench, bench, greedy, hf_greedy, prompt
from tests.support.tiny_models import hf_dir

from lamella_core.engine import BuildConfig
from lamella_core.errors import EngineDeadError, RequestError, StepError
from lamella_core.models.registry import get_model_class
from lamella_executor import GenerationExecutor, KvCacheConfig, RequestStatus, SamplingParams

IDS = prompt(9)


@pytest.fixture
def it():
    with bench() as made:
        yield made


def swap_runner(it: Bench, run) -> None:
    """Replaces the forward pass; ``run(plan, original)``."""
    original = it.loop._runner.run

    class Runner:
        def run(self, plan):
            return run(plan, original)

    it.loop._runner = Runner()


def others_go_on(it: Bench, futures: list) -> None:
    for future in futures:
        assert future.result(30).outputs[0].token_ids == hf_greedy(IDS, 20)
    assert it.idle_blocks() == (0, 0)


def test_a_logits_processor_that_raises_fails_only_its_request(it):
    def processor(req_id, logits, token_ids, stream_ptr, client_id):
        if len(token_ids[0]) > len(IDS) + 3:
            raise ValueError("no more")

    others = [it.executor.generate_async(IDS, greedy(20)) for _ in range(3)]
    bad = it.executor.generate_async(IDS, greedy(20, logits_processor=processor))
    with pytest.raises(RequestError, match="no more"):
        bad.result(30)
    assert bad.status is RequestStatus.FAILED
    others_go_on(it, others)


def test_a_decoder_that_raises_fails_only_its_request(it):
    class Decoder:
        text = ""

        def push(self, token_id):
            raise UnicodeError("broken tokenizer")

        def finish(self): ...

        def fork(self):
            return self

    others = [it.executor.generate_async(IDS, greedy(20)) for _ in range(2)]
    for params in (greedy(20), greedy(20, n=3, temperature=1.0)):
        bad = it.executor.generate_async(IDS, params, decoder=Decoder())
        with pytest.raises(RequestError, match="UnicodeError: broken tokenizer"):
            bad.result(30)
    others_go_on(it, others)


def test_nan_logits_fail_only_their_request():
    model = get_model_class(LLAMA[0]).from_hugging_face(hf_dir(*LLAMA))
    poison = min(set(range(131)) - {*IDS, *hf_greedy(IDS, 20), 5, 6, *hf_greedy([5, 6], 5)})
    with torch.no_grad():
        model.embed_tokens.weight[poison] = float("nan")
    with bench(model) as it:
        others = [it.executor.generate_async(IDS, greedy(20)) for _ in range(3)]
        variants = (greedy(5), greedy(5, temperature=1.0), greedy(5, n=2, use_beam_search=True))
        bad = [it.executor.generate_async([5, poison, 6], params) for params in variants]
        for future in bad:
            with pytest.raises(RequestError, match="NaN"):
                future.result(30)
        others_go_on(it, others)
        # Nothing of the poisoned prompt is left in the cache.
        assert it.executor.generate([5, 6], greedy(5)).outputs[0].token_ids == hf_greedy([5, 6], 5)


def test_a_failing_forward_fails_its_step_and_the_engine_goes_on(it):
    victims: list[int] = []

    def run(plan, original):
        ids = {item.request.request_id for item in plan.items}
        if len(ids) == 3 and not victims:
            victims.extend(ids)
            raise MemoryError("no room for activations")
        return original(plan)

    swap_runner(it, run)
    futures = [it.executor.generate_async(IDS, greedy(20)) for _ in range(3)]
    failed = []
    for future in futures:
        try:
            assert future.result(30).outputs[0].token_ids == hf_greedy(IDS, 20)
        except StepError as error:
            assert "MemoryError: no room for activations" in str(error)
            assert isinstance(error.__cause__, MemoryError)
            failed.append(future.request_id)
    assert sorted(failed) == sorted(victims)
    others_go_on(it, [it.executor.generate_async(IDS, greedy(20))])


def test_blocks_of_a_failed_step_are_not_reused(it):
    def run(plan, original):
        original(plan)
        if not broken.is_set():
            broken.set()
            raise ArithmeticError("bad step")
        return original(plan)

    broken = threading.Event()
    swap_runner(it, run)
    with pytest.raises(StepError):
        it.executor.generate(IDS, greedy(20))
    assert it.kv.stats().num_cached == 0
    result = it.executor.generate(IDS, greedy(20))
    assert result.metrics.num_reused_tokens == 0


def test_a_fatal_error_reaches_every_waiter(it):
    class Broken:
        def sample(self, rows, logits):
            raise AssertionError("an invariant is violated")

    it.loop._updater._sampler = Broken()
    with it.held():  # otherwise the engine may be dead before the last one is sent
        futures = [it.executor.generate_async(IDS, greedy(20)) for _ in range(5)]
    for future in futures:
        with pytest.raises(EngineDeadError, match="AssertionError: an invariant is violated"):
            future.result(30)
    with pytest.raises(EngineDeadError, match="an invariant"):
        it.executor.generate(IDS)
    assert not it.executor.is_alive


def test_an_engine_without_progress_dies_instead_of_hanging(it):
    it.loop._scheduler._schedule_waiting = lambda step: None
    with pytest.raises(EngineDeadError, match="no progress: 1 requests wait"):
        it.executor.generate(IDS)


def test_a_thousand_requests_aborted_at_random(it):
    rng = random.Random(0)
    results = []

    def submit(seed: int) -> None:
        own = random.Random(seed)
        mine = []
        for _ in range(250):
            kinds = ({}, {"temperature": 1.0, "n": 2}, {"use_beam_search": True, "n": 2}, {"prompt_logprobs": 0})
            ids = prompt(own.randrange(1, 30), seed=own.randrange(5))
            mine.append(
                it.executor.generate_async(ids, greedy(own.randrange(1, 12), **own.choice(kinds)), own.random() < 0.5)
            )
            if own.random() < 0.8:
                own.choice(mine[-8:]).abort()
        results.extend(mine)

    threads = [threading.Thread(target=submit, args=(rng.randrange(1000),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if rng.random() < 0.7:
            result.abort()
    statuses = [result.result(120).status for result in results]
    assert len(statuses) == 1000
    assert set(statuses) == {RequestStatus.FINISHED, RequestStatus.CANCELLED}
    for result in results:
        wanted = {"cancelled", "length"} if result.status is RequestStatus.CANCELLED else {"length"}
        assert {o.finish_reason for o in result.outputs} <= wanted
    assert it.idle_blocks() == (0, 0)


def test_abort_while_queued_and_while_running():
    with bench(max_batch_size=1) as it:
        running = it.executor.generate_async(IDS, greedy(50), streaming=True)
        queued = it.executor.generate_async(IDS, greedy(50))
        next(iter(running))
        queued.abort()
        assert queued.result(30).status is RequestStatus.CANCELLED
        assert queued.outputs[0].token_ids == [] and queued.outputs[0].finish_reason == "cancelled"
        it.executor.abort(running.request_id)
        tokens = running.result(30).outputs[0].token_ids
        assert tokens == hf_greedy(IDS, 50)[: len(tokens)]
        assert it.idle_blocks() == (0, 0)


class LetterDecoder:
    """Token i is one letter; "ab" of a word made of tokens 0 and 1."""

    def __init__(self) -> None:
        self.text = ""

    def push(self, token_id: int) -> None:
        self.text += chr(ord("a") + token_id % 26)

    def finish(self) -> None: ...

    def fork(self) -> LetterDecoder:
        other = LetterDecoder()
        other.text = self.text
        return other


def spell(token_ids: list[int]) -> str:
    decoder = LetterDecoder()
    for token in token_ids:
        decoder.push(token)
    return decoder.text


def test_streaming_holds_back_what_may_begin_a_stop_string(it):
    whole = spell(hf_greedy(IDS, 20))
    stop = whole[6:10]
    cut = whole.index(stop)
    params = greedy(20, stop=[stop, "zzzzzz"])
    future = it.executor.generate_async(IDS, params, streaming=True, decoder=LetterDecoder())
    shown, diffs, ids = [], "", []
    for partial in future:
        shown.append(partial.outputs[0].text)
        diffs += partial.outputs[0].text_diff
        ids += partial.outputs[0].token_ids_diff
    assert all(whole[:cut].startswith(text) for text in shown)
    assert diffs == shown[-1] == whole[:cut]
    assert spell(ids) == whole[:cut]
    assert (future.outputs[0].finish_reason, future.outputs[0].stop_reason) == ("stop", stop)


def test_streamed_samples_add_up(it):
    future = it.executor.generate_async(
        IDS, greedy(12, n=3, temperature=1.0, seed=1), streaming=True, decoder=LetterDecoder()
    )
    ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for partial in future:
        for output in partial.outputs:
            ids[output.index] += output.token_ids_diff
    assert [ids[o.index] for o in future.outputs] == [o.token_ids for o in future.outputs]
    assert all(o.text == spell(o.token_ids) and len(o.token_ids) == 12 for o in future.outputs)


def test_two_models_in_one_process(it):
    with bench(("GPT2LMHeadModel", "tied")) as other:
        mine = [it.executor.generate_async(IDS, greedy(20)) for _ in range(3)]
        theirs = [other.executor.generate_async(IDS, greedy(20)) for _ in range(3)]
        assert {tuple(r.result(30).outputs[0].token_ids) for r in mine} == {tuple(hf_greedy(IDS, 20))}
        want = hf_greedy(IDS, 20, ("GPT2LMHeadModel", "tied"))
        assert {tuple(r.result(30).outputs[0].token_ids) for r in theirs} == {tuple(want)}


def test_create_from_a_saved_engine(tmp_path):
    from tests.support.executors import tiny_model

    from lamella_core.engine import Engine

    Engine.from_model(tiny_model(), BuildConfig(max_batch_size=4, max_num_tokens=64)).save(tmp_path / "engine")
    with GenerationExecutor.create(str(tmp_path / "engine"), KvCacheConfig(max_tokens=256)) as executor:
        assert executor.generate(IDS, greedy(20)).outputs[0].token_ids == hf_greedy(IDS, 20)
        assert executor.generate([IDS, IDS[:3]], SamplingParams(max_tokens=1, ignore_eos=True))[1].done
