"""Engines of several ranks: sizes and their contradictions, ranks built side by side, errors that name the rank."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_models import hf_dir
from tests.support.tiny_scoring import scoring_model
from typer.testing import CliRunner, Result

from lamella_builder import cli, rank_pool
from lamella_builder.job import BuildJob, BuildRequest, with_choices
from lamella_builder.rank_source import RankSource
from lamella_builder.sizes import ParallelSizes, parse_partition
from lamella_core.config import ModelConfig
from lamella_core.engine import BuildConfig, Engine, EngineSpec
from lamella_core.engine.writer import write_rank
from lamella_core.errors import CheckpointError, ConfigError, LamellaError, OutOfMemoryError, WorkerError
from lamella_core.mapping import Mapping
from lamella_core.models.llama import LlamaForCausalLM

DEFAULT = BuildConfig(kernel_selection="default", device="cpu")


@pytest.fixture
def model() -> Path:
    return hf_dir("LlamaForCausalLM", "grouped")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def failed(result: Result) -> str:
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    return " ".join(result.output.split())


def assert_same_engines(one: Path, other: Path, world_size: int) -> None:
    for rank in range(world_size):
        a, b = Engine.load(one, rank), Engine.load(other, rank)
        assert a.spec.model == b.spec.model and a.spec.plans == b.spec.plans
        assert a.weights(rank).keys() == b.weights(rank).keys()
        for name, tensor in a.weights(rank).items():
            assert torch.equal(tensor, b.weights(rank)[name]), name


def test_ranks_side_by_side_are_those_built_one_after_another(model: Path, tmp_path: Path) -> None:
    request = BuildRequest(str(model), tmp_path / "one", DEFAULT, ParallelSizes(tp_size=2, pp_size=2))
    BuildJob(request).run()
    reported: list[tuple[str, int, int]] = []
    job = BuildJob(replace(request, output_dir=tmp_path / "other", workers=2))
    seconds = job.run(lambda *report: reported.append(report))
    assert_same_engines(tmp_path / "one", tmp_path / "other", 4)
    assert list(seconds) == ["build 4 ranks"]
    assert {f"rank {rank}" for rank in range(4)} < {name for name, _, _ in reported}
    assert ("rank 3", len(rank_pool.STEPS), len(rank_pool.STEPS)) in reported
    assert {"read weights", "write engine"} <= Engine.load(tmp_path / "other").spec.step_seconds.keys()


def test_the_first_ranks_of_the_first_and_last_stage_time_kernels(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RankSource(
        model, "hugging_face", replace(DEFAULT, kernel_selection="timed"), Mapping(4, tp_size=2, pp_size=2)
    )
    built: list[tuple[list[int], int]] = []

    def build(self: rank_pool.RankPool, ranks: list[int], like: EngineSpec | None) -> list[Any]:
        built.append((list(ranks), 0 if like is None else len(like.timings)))
        made = [RankSource.from_dict(self._task["source"]).engine(rank, like=like) for rank in ranks]
        return [(e.spec, write_rank(Path(self._task["directory"]), r, e.weights(r))) for r, e in zip(ranks, made)]

    monkeypatch.setattr(rank_pool.RankPool, "build", build)
    request = BuildRequest(str(model), tmp_path / "engine", source.build_config, ParallelSizes(tp_size=2, pp_size=2), 2)
    seconds = BuildJob(request).run()
    first, last = source.engine(0).spec, source.engine(2).spec
    assert built == [([0], 0), ([2], len(first.timings)), ([1, 3], len(with_choices(first, last).timings))]
    assert list(seconds) == ["build rank 0", "build rank 2", "build 2 ranks"]
    assert Engine.load(tmp_path / "engine", 3).model(3).lm_head is not None
    BuildJob(replace(request, sizes=ParallelSizes(pp_size=2))).run()
    assert [ranks for ranks, _ in built[3:]] == [[0], [1]]


def test_an_error_of_a_rank_is_one_error_with_the_rank_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    config = {**json.loads((model / "config.json").read_text()), "num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    message = failed(run("--model", source, "--output_dir", tmp_path / "engine", "--tp_size", 2, "--workers", 2,
                         "--kernel_selection", "default"))  # fmt: skip
    assert "lamella-build: rank " in message and "unexpected" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dead_process_is_told_with_rank_signal_and_step() -> None:
    printed = StringIO("allocating\n")
    error = rank_pool._death(3, -signal.SIGKILL, "read weights", printed)
    assert isinstance(error, WorkerError)
    assert str(error) == (
        "the process that builds rank 3 was killed by signal 9 (SIGKILL); perhaps memory ran out: lower --workers, in "
        "step 'read weights'. It said: allocating"
    )
    assert "exited with code 3" in str(rank_pool._death(0, 3, "start", StringIO()))


def test_errors_keep_their_class() -> None:
    error = rank_pool._error(1, {"error": "CheckpointError", "message": "no weights"})
    assert isinstance(error, CheckpointError) and str(error) == "rank 1: no weights"
    for unknown in (None, "nearest_name", "Nothing"):
        assert type(rank_pool._error(1, {"error": unknown, "message": "x"})) is WorkerError


def test_more_workers_than_memory_are_refused(model: Path, tmp_path: Path) -> None:
    job = BuildJob(BuildRequest(str(model), tmp_path / "engine", DEFAULT, ParallelSizes(tp_size=4), workers=4))
    job.plan = replace(job.plan, available_bytes=int(2.5 * job.plan.build_bytes))
    with pytest.raises(OutOfMemoryError, match="building 4 ranks at once takes.*lower workers to 2"):
        job.run()
    assert list(tmp_path.iterdir()) == []


def test_experts_and_partitions(tmp_path: Path) -> None:
    model = hf_dir("MixtralForCausalLM", "top2")
    out = tmp_path / "engine"
    result = run("--model", model, "--output_dir", out, "--tp_size", 2, "--moe_ep_size", 2, "--pp_size", 2,
                 "--pp_partition", "1,1", "--gpus_per_node", 2, "--kernel_selection", "default")  # fmt: skip
    assert result.exit_code == 0, result.output
    mapping = Engine.load(out, 3).spec.model.mapping
    assert (mapping.rank, mapping.moe_tp_size, mapping.moe_ep_size, mapping.pp_partition) == (3, 1, 2, (1, 1))
    assert mapping.gpus_per_node == 2 and "which LLM starts itself" in " ".join(result.output.split())


def test_auto_parallel_says_why(model: Path, tmp_path: Path) -> None:
    arguments = ("--model", model, "--output_dir", tmp_path / "engine", "--auto_parallel", "--device", "cpu")
    result = run(*arguments, "--world_size", 2, "--dry_run")
    assert result.exit_code == 0, result.output
    assert "auto_parallel: LlamaForCausalLM" in result.output and "chosen" in result.output
    assert "auto_parallel needs world_size" in failed(run(*arguments))
    assert "tp_size is 2; leave it out" in failed(run(*arguments, "--world_size", 2, "--tp_size", 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--moe_ep_size", "3", "--tp_size", "2"], "must equal tp_size 2"),
        (["--pp_partition", "1,x"], "--pp_partition is '1,x'"),
        (["--pp_size", "2", "--pp_partition", "1,1,1"], "needs a list of 2 entries"),
        (["--pp_size", "2", "--pp_partition", "3,1"], "adds up to 4 layers; the model has 2"),
        (["--world_size", "4", "--tp_size", "2"], "world_size is 4, but tp_size x pp_size is 2"),
        (["--workers", "0"], "workers is 0"),
        (["--pp_size", "3"], "pp_size 3 exceeds the model's 2 layers"),
    ],
)
def test_wrong_sizes(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in failed(run("--model", model, "--output_dir", tmp_path / "engine", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_scores_texts_is_built_for_one_rank_alone(tmp_path: Path) -> None:
    directory, _ = scoring_model("LlamaForSequenceClassification", "three_labels")
    for sizes in (ParallelSizes(tp_size=2), ParallelSizes(auto_parallel=True, world_size=2)):
        with pytest.raises(ConfigError, match="= 2 ranks, but LlamaForSequenceClassification scores texts"):
            BuildJob(BuildRequest(str(directory), tmp_path / "engine", DEFAULT, sizes))


def test_a_checkpoint_of_several_ranks_keeps_its_sizes(model: Path, tmp_path: Path) -> None:
    for rank in range(2):
        mapping = Mapping(world_size=2, tp_size=2, rank=rank)
        LlamaForCausalLM.from_hugging_face(model, mapping=mapping).save_checkpoint(tmp_path / "checkpoint")
    arguments = ("--checkpoint_dir", tmp_path / "checkpoint", "--output_dir", tmp_path / "engine")
    assert run(*arguments, "--kernel_selection", "default").exit_code == 0
    assert Engine.load(tmp_path / "engine", 1).world_size == 2
    message = failed(run(*arguments, "--tp_size", 4))
    assert "tp_size is 4, but the checkpoint" in message and "made for 2 ranks, tp_size 2 x pp_size 1" in message
    message = failed(run(*arguments, "--auto_parallel", "--world_size", 4))
    assert "world_size is 4" in message


def test_a_rank_built_in_memory_is_the_one_that_was_built_to_run(model: Path) -> None:
    source = RankSource(model, "hugging_face", replace(DEFAULT, dtype="bfloat16"), Mapping(2, tp_size=2))
    like = source.engine(0).spec
    built, same = source.engine(1), source.engine_like(1, like)
    assert same.spec.plans == built.spec.plans and same.spec.model == built.spec.model
    assert all(torch.equal(tensor, same.weights(1)[name]) for name, tensor in built.weights(1).items())


def test_a_source_survives_json(model: Path) -> None:
    source = RankSource(model, "hugging_face", DEFAULT, Mapping(2, tp_size=2), "bfloat16", load_format="dummy")
    assert RankSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source


def test_the_kernels_of_the_first_rank_count() -> None:
    spec = Engine.from_model(LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", "grouped"))).spec
    record = {"n": 1, "k": 2, "dtype": "float32", "is_output_layer": False, "plan": "a"}
    one, other = (
        replace(spec, timings=records) for records in ((record,), ({**record, "plan": "b"}, {**record, "n": 9}))
    )
    assert [r["plan"] for r in with_choices(with_choices(None, one), other).timings] == ["a", "a"]
    assert with_choices(None, one).plans == {}


def test_sizes_by_themselves() -> None:
    assert parse_partition(None) is None and parse_partition("20,12") == (20, 12)
    assert ParallelSizes(tp_size=2, moe_tp_size=-1).mapping() == Mapping(2, tp_size=2)
    for values, message in (
        ({"tp_size": True}, "tensor_parallel_size is True"),
        ({"pp_size": 0}, "pipeline_parallel_size is 0"),
        ({"auto_parallel": 1}, "auto_parallel is 1"),
        ({"pp_partition": "12"}, "pp_partition is '12'"),
        ({"auto_parallel": True, "pp_partition": (1, 1)}, "pp_partition is"),
    ):
        with pytest.raises(ConfigError, match=message):
            ParallelSizes(**values, long_names=True)  # type: ignore[arg-type]

    def read(mapping: Mapping) -> ModelConfig:
        raise LamellaError(str(mapping.tp_size))

    with pytest.raises(LamellaError, match="2"):
        ParallelSizes(tp_size=2).resolve(read, DEFAULT)


def test_each_gpu_holds_one_rank_and_a_cpu_all(model: Path) -> None:
    request = BuildRequest(str(model), Path("unused"), DEFAULT, ParallelSizes(tp_size=2))
    host = BuildJob(request).plan
    assert host.world_size == 2 and host.run_bytes > 2 * max(host.weight_bytes) + 2 * host.base_bytes
    gpu = replace(host, device="cuda", total_bytes=80 << 30, available_bytes=70 << 30)
    assert gpu.run_bytes < max(gpu.weight_bytes) + 2 * gpu.base_bytes
    gpu.check()
    with pytest.raises(OutOfMemoryError, match="running takes at least"):
        replace(gpu, activation_bytes=80 << 30).check()
    replace(host, activation_bytes=1 << 50).check()  # where ranks on CPUs will run is not known
