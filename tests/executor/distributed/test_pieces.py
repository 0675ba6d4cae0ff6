"""The small parts of an engine of several ranks, each by itself."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.echo_loop import LIMITS, EchoLoop
from tests.support.sharded import LIMITS as BUILD
from tests.support.sharded import sharded_engine
from tests.support.tiny_models import hf_dir
from tests.support.worker_crews import wait_for

from lamella_core.engine import BuildConfig, Engine
from lamella_core.errors import CommunicationError, ConfigError, EngineDeadError, WorkerError
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams, engine_thread
from lamella_executor.memory import KvCachePlan
from lamella_executor.runner.base import LaunchingRunner, PipelinedRunner
from lamella_executor.runner.distributed import Sender, distribute
from lamella_executor.runner.setup import RunnerSetup
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.worker import lead
from lamella_executor.worker.interruptible import run_interruptibly
from lamella_executor.worker.lead import Alarm
from lamella_executor.worker.options import RankOptions
from lamella_executor.worker.recipe import EngineRecipe, find_recipe
from lamella_executor.worker.threads import limit_threads

LLAMA = ("LlamaForCausalLM", "one_kv_head")
FOUR = Mapping(world_size=4, tp_size=4)


class Peers:
    """Other ranks that take everything; ``verdict`` is what the watcher finds when asked."""

    def __init__(self, verdict: WorkerError | None = None) -> None:
        self.failure: WorkerError | None = None
        self.verdict = verdict
        self.expected: list[int | None] = []
        self.told: list[WorkerError] = []

    def set_phase(self, phase: str) -> None: ...

    def expect(self, step: int | None) -> None:
        self.expected.append(step)

    def broadcast_frame(self, kind: int, payload: bytes | memoryview) -> None:
        if self.failure is not None:
            raise self.failure

    def await_failure(self, timeout_s: float) -> WorkerError | None:
        self.failure = self.verdict
        return self.failure


class Local:
    """A launching runner whose steps end as it is told."""

    def __init__(self, error: Exception | None = None, at: str = "collect", peers: Peers | None = None) -> None:
        self.error, self.at, self.peers = error, at, peers
        self.logits = None

    def launch(self, plan: StepPlan) -> Any:
        self._fail("launch")
        return self

    def collect(self) -> list[int]:
        if self.peers is not None:
            self.peers.failure = WorkerError("rank 1 died")
        self._fail("collect")
        return [3]

    def _fail(self, at: str) -> None:
        if self.error is not None and self.at == at:
            raise self.error


def distributed(local: Any, peers: Peers) -> Any:
    return distribute(local, Sender(peers, 4, peers.told.append))


def test_the_wrapper_is_of_the_runners_own_kind():
    peers = Peers()
    launching = distributed(Local(), peers)
    assert isinstance(launching, LaunchingRunner) and not isinstance(launching, PipelinedRunner)
    local = Local()
    local.max_in_flight, local.is_sampling = 3, False
    pipelined = distributed(local, peers)
    assert isinstance(pipelined, PipelinedRunner) and (pipelined.max_in_flight, pipelined.is_sampling) == (3, False)
    plain = distributed(SimpleNamespace(run=lambda plan: torch.zeros(1)), peers)
    assert not isinstance(plain, LaunchingRunner) and plain.run(StepPlan()).shape == (1,)


def test_waits_are_announced_by_their_step():
    peers = Peers()
    runner = distributed(Local(), peers)
    first, second = runner.launch(StepPlan()), runner.launch(StepPlan())
    assert (first.collect(), second.collect()) == ([3], [3])
    assert peers.expected == [1, None, 2, None]


@pytest.mark.parametrize("at", ["launch", "collect"])
def test_a_collective_that_fails_is_the_failure_of_whoever_died(at):
    peers = Peers(WorkerError("rank 1 was killed"))
    runner = distributed(Local(CommunicationError("connection closed"), at), peers)
    with pytest.raises(WorkerError, match="^rank 1 was killed$"):
        runner.launch(StepPlan()).collect()
    assert not peers.told


@pytest.mark.parametrize("at", ["launch", "collect"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), TypeError("odd")])
def test_an_error_of_its_own_is_fatal_and_told_at_once(at, error):
    peers = Peers(WorkerError("nobody asks"))
    runner = distributed(Local(error, at), peers)
    with pytest.raises(WorkerError, match=f"rank 0 failed in phase decode: {type(error).__name__}: {error}"):
        runner.launch(StepPlan()).collect()
    assert len(peers.told) == 1


def test_results_of_a_step_in_which_a_rank_died_are_not_used():
    peers = Peers()
    with pytest.raises(WorkerError, match="rank 1 died"):
        distributed(Local(peers=peers), peers).launch(StepPlan()).collect()


def test_nothing_is_launched_once_a_rank_has_failed():
    peers = Peers()
    peers.failure = WorkerError("rank 1 died")
    with pytest.raises(WorkerError, match="rank 1 died"):
        distributed(Local(AssertionError("was launched"), "launch"), peers).launch(StepPlan())


def test_the_alarm_sounds_once_whoever_comes_late():
    alarm, heard, aborted = Alarm(), [], []
    alarm.connect(heard.append)
    first = WorkerError("first")
    alarm(first)
    alarm(WorkerError("second"))
    alarm.guard(SimpleNamespace(abort=lambda: aborted.append(True)))
    alarm.connect(heard.append)
    assert alarm.settle(5)
    assert heard == [first, first] and aborted == [True] and alarm.stop.is_set()


def test_an_abort_that_hangs_holds_nobody_else():
    alarm, gate = Alarm(), threading.Event()
    alarm.guard(SimpleNamespace(abort=lambda: gate.wait(30)))
    alarm(WorkerError("rank 1 died"))
    assert not alarm.settle(0.01)
    gate.set()
    assert alarm.settle(5)


@pytest.mark.parametrize("hangs", [True, False])
def test_users_hear_of_a_failure_even_if_the_loop_hangs(hangs, monkeypatch):
    monkeypatch.setattr(engine_thread, "ABANDON_S", 0.2)
    loop, alarm = EchoLoop(), Alarm()
    executor = GenerationExecutor(loop, LIMITS, connect=alarm.connect)
    loop.gate.clear()
    results = [executor.generate_async([5], SamplingParams(max_tokens=9)) for _ in range(3)]
    assert wait_for(lambda: len(loop.active) > 0)
    if not hangs:
        loop.gate.set()
    alarm(WorkerError("rank 1 died"))
    for result in results:
        with pytest.raises(EngineDeadError, match="WorkerError: rank 1 died"):
            result.result(5)
    with pytest.raises(EngineDeadError, match="rank 1 died"):
        executor.generate([5])
    loop.gate.set()
    executor.shutdown()


def test_options_cross_as_json():
    kv = KvCacheConfig(max_tokens=64, max_attention_window=(4, 8), sink_token_length=1, free_gpu_memory_fraction=0.3)
    options = RankOptions(kv, 4, None, "torch", ("a", "b"), 12.5)
    assert RankOptions.decode(options.encode()) == options


def test_ranks_of_one_machine_share_its_budget():
    options = RankOptions(KvCacheConfig(host_memory_bytes=1000), hosts=("a", "a", "b"))
    assert [options.own_kv_config(rank).host_memory_bytes for rank in range(3)] == [500, 500, 1000]
    assert [options.ranks_beside(rank) for rank in range(3)] == [2, 2, 1]
    assert RankOptions(KvCacheConfig()).ranks_beside(0) == 1


def test_the_least_number_of_blocks_is_agreed_on():
    groups = SimpleNamespace(agree_min=lambda value: min(value, 7))
    setup = RunnerSetup(None, [], {}, 4, None, KvCacheConfig(), None, groups)  # type: ignore[arg-type]
    assert setup.agreed(KvCachePlan(9, 4, 100)).num_blocks == 7
    assert setup.agreed(KvCachePlan(5, 4, 100)).num_blocks == 5


@pytest.mark.parametrize(
    ("target", "arguments", "match"),
    [
        ("no_colon", {}, "EngineRecipe.target is 'no_colon'"),
        ("a:b:c", {}, "must be like 'package.module:function'"),
        ("a:b", {"x": object()}, "arguments cannot be sent"),
        ("a:b", {"x": float("nan")}, "arguments cannot be sent"),
        ("a:b", {"rank": 1}, "other than 'rank'"),
        ("a:b", [1], "arguments cannot be sent"),
    ],
)
def test_bad_recipes(target, arguments, match):
    with pytest.raises(ConfigError, match=match):
        EngineRecipe(target, arguments, FOUR, "cpu")


def test_a_recipe_keeps_what_json_keeps():
    given = {"sizes": (1, 2), "name": "x"}
    recipe = EngineRecipe("a.b:c", given, FOUR, "cpu")
    assert recipe.arguments == {"sizes": [1, 2], "name": "x"}
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        EngineRecipe("a.b:c", {}, FOUR, "tpu")


def test_engines_of_several_ranks_are_found_by_their_directory():
    directory = sharded_engine(*LLAMA, 4)
    by_path, by_engine = find_recipe(directory), find_recipe(Engine.load(directory, rank=2))
    assert by_path == by_engine and by_path is not None and by_path.mapping == FOUR
    assert by_path.load(3).ranks == [3]


def test_an_engine_in_memory_of_one_rank_of_several_says_what_to_do():
    mapping = Mapping(world_size=2, tp_size=2)
    model = get_model_class(LLAMA[0]).from_hugging_face(hf_dir(*LLAMA), mapping=mapping)
    engine = Engine.from_model(model, BuildConfig(**BUILD))
    with pytest.raises(
        ConfigError, match=r"2 ranks \(tp_size 2 x pp_size 1\) and holds ranks \[0\] in memory.*lamella-build"
    ):
        GenerationExecutor.create(engine)


def test_fewer_gpus_than_ranks_says_how_to_build_again(monkeypatch):
    recipe = EngineRecipe("a:b", {}, FOUR, "cpu")
    object.__setattr__(recipe, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"for 4 ranks .*this machine, which has 2\..*lamella-build --tp_size 2"):
        lead.Ranks(recipe, RankOptions(KvCacheConfig()), worker_timeout_s=30.0)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), "soon"])
def test_timeouts_are_checked(seconds):
    with pytest.raises(ConfigError, match="worker_timeout_s"):
        GenerationExecutor.create(sharded_engine(*LLAMA, 2), worker_timeout_s=seconds)


def test_one_threads_cores_are_its_own():
    before = torch.get_num_threads()

    def inside() -> tuple[int, int]:
        limit_threads(before + 1)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return torch.get_num_threads(), later[0]

    assert run_interruptibly(inside, lambda: None) == (before + 1, before)
    assert torch.get_num_threads() == before


def test_work_is_given_up_between_two_steps_of_its_code():
    began, ended = threading.Event(), threading.Event()

    def work() -> None:
        try:
            while True:
                began.set()
                time.sleep(0.01)
        finally:
            ended.set()

    def check() -> None:
        if began.is_set():
            raise WorkerError("rank 1 died")

    with pytest.raises(WorkerError, match="rank 1 died"):
        run_interruptibly(work, check)
    assert ended.is_set()


def test_work_returns_or_raises_as_a_call_does():
    assert run_interruptibly(lambda: 5, lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 // 0, lambda: None)
