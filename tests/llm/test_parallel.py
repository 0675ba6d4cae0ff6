"""LLM on several ranks: what each rank is told, checks before anything starts, and real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lamella import LLM, SamplingParams, ranks
from lamella.args import LlmArgs
from lamella.cli.bench.plan import BenchPlan
from lamella.cli.bench.summary import against_roofline
from lamella.cli.sizes import sizes
from lamella.loading import open_engine, save_engine
from lamella.ranks import RankRecipe, build_rank, check_ranks, source_recipe
from lamella.roofline import find_hardware
from lamella_builder.job import BuildJob, BuildRequest
from lamella_builder.rank_source import RankSource
from lamella_builder.sizes import ParallelSizes
from lamella_core.config import ModelConfig
from lamella_core.engine import BuildConfig, Engine
from lamella_core.errors import ConfigError
from lamella_core.mapping import Mapping
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "demo-4m"
PROMPTS = ["Once upon a time", "One day, a small bear named Tom"]
DEFAULT = BuildConfig(kernel_selection="default", device="cpu")
H100 = "NVIDIA H100 80GB HBM3"


def recipe_of(model: Any, **arguments: Any) -> RankRecipe:
    opened, _ = open_engine(LlmArgs.create(model=model, device="cpu", **arguments))
    assert isinstance(opened, RankRecipe)
    return opened


@pytest.fixture(scope="module")
def engine_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "two"
    BuildJob(BuildRequest(str(model_dir), out, DEFAULT, ParallelSizes(tp_size=2))).run()
    return out


def test_two_ranks_write_what_one_writes_and_are_saved_and_opened(tmp_path: Path) -> None:
    params, limits = SamplingParams(max_tokens=24), {"max_batch_size": 4, "max_seq_len": 96, "dtype": "float32"}
    with LLM(DEMO, **limits) as llm:
        expected = [output.text for output in llm.generate(PROMPTS, params)]
    with LLM(DEMO, tensor_parallel_size=2, worker_timeout_s=60, **limits) as llm:
        assert [output.text for output in llm.generate(PROMPTS, params)] == expected
        assert llm.engine.world_size == 2 and llm.engine.ranks == [0]
        llm.save(tmp_path / "engine")
    assert sorted(path.name for path in (tmp_path / "engine").glob("rank*")) == [
        "rank0.safetensors", "rank1.safetensors",
    ]  # fmt: skip
    with LLM(tmp_path / "engine") as llm:  # the sizes are the engine's
        assert [output.text for output in llm.generate(PROMPTS, params)] == expected


def test_a_rank_that_cannot_load_is_one_error(model_dir: Path, tmp_path: Path, engine_dir: Path) -> None:
    broken = tmp_path / "engine"
    broken.mkdir()
    for path in engine_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "rank1.safetensors").unlink()
    with pytest.raises(Exception, match="rank 1.*rank1.safetensors is missing"):
        LLM(broken, device="cpu")
    LLM(model_dir, device="cpu").shutdown()  # nothing of the failed one is in the way


def test_every_rank_is_told_the_same_in_json(model_dir: Path) -> None:
    recipe = recipe_of(model_dir, tensor_parallel_size=2, dtype="bf16", max_seq_len=64)
    assert (recipe.target, recipe.mapping, recipe.device) == ("lamella.ranks:build_rank", Mapping(2, tp_size=2), "cpu")
    arguments = json.loads(recipe.encode_arguments())
    assert arguments["source"]["directory"] == str(model_dir) and arguments["like"] is None
    assert arguments["source"]["build_config"]["device"] == "cpu" and not recipe._kept
    engine = build_rank(rank=1, **arguments)
    assert engine.ranks == [1] and engine.spec.build.max_seq_len == 64 and engine.spec.model.dtype == "bfloat16"
    assert recipe.engine is recipe.load(0) and recipe.engine.spec.plans.keys() == engine.spec.plans.keys()


def test_timed_kernels_are_those_of_rank_0_on_all(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = RankSource.engine

    def engine(self: RankSource, rank: int, *rest: Any, **named: Any) -> Engine:
        asked.append((rank, named["like"] is not None))
        return original(self, rank, *rest, **named)

    monkeypatch.setattr(RankSource, "engine", engine)
    source = RankSource(model_dir, "hugging_face", replace(DEFAULT, kernel_selection="timed"), Mapping(2, tp_size=2))
    recipe = source_recipe(source)
    assert recipe.load(0) is recipe.engine
    other = build_rank(rank=1, **json.loads(recipe.encode_arguments()))
    assert asked == [(0, False), (1, True)]
    assert other.spec.plans == recipe.engine.spec.plans


def test_dummy_weights_and_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    recipe = recipe_of(tmp_path, tensor_parallel_size=2, load_format="dummy")
    assert recipe.arguments["source"]["load_format"] == "dummy" and recipe.tokenizer_dir is None
    for rank in range(2):
        model = LlamaForCausalLM.from_hugging_face(model_dir, mapping=Mapping(2, rank, tp_size=2))
        model.save_checkpoint(tmp_path / "checkpoint")
    recipe = recipe_of(tmp_path / "checkpoint")
    assert recipe.mapping.world_size == 2
    assert build_rank(rank=1, **recipe.arguments).ranks == [1]
    with pytest.raises(
        ConfigError, match="pipeline_parallel_size is 2, but the checkpoint.*2 ranks.*convert the model"
    ):
        recipe_of(tmp_path / "checkpoint", pipeline_parallel_size=2)


def test_an_engine_keeps_its_sizes(engine_dir: Path) -> None:
    recipe = recipe_of(engine_dir, tensor_parallel_size=2, world_size=2)
    assert recipe.mapping.tp_size == 2 and recipe.tokenizer_dir == engine_dir.resolve()
    for wrong, message in (
        ({"tensor_parallel_size": 1}, "tensor_parallel_size is 1, but the engine was made for 2 ranks, tp_size 2 x "
                                      "pp_size 1.*lamella-build --tp_size 1 --pp_size 1"),
        ({"tensor_parallel_size": 4}, "lamella-build --tp_size 4"),
        ({"auto_parallel": True, "world_size": 4}, "world_size is 4.*--auto_parallel --world_size 4"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            recipe_of(engine_dir, **wrong)
    assert recipe_of(engine_dir, auto_parallel=True, world_size=2).mapping.world_size == 2


def test_an_engine_object_of_several_ranks_needs_its_directory(engine_dir: Path) -> None:
    engine = Engine.load(engine_dir)
    assert recipe_of(engine).arguments == {"directory": str(engine_dir)}
    with pytest.raises(ConfigError, match="built for 2 ranks.*in memory.*tensor_parallel_size=2"):
        recipe_of(Engine(engine.spec, {0: engine.weights(0)}))


@pytest.mark.parametrize("from_engine", [False, True])
def test_saving_writes_every_rank(model_dir: Path, engine_dir: Path, tmp_path: Path, from_engine: bool) -> None:
    recipe = recipe_of(engine_dir) if from_engine else recipe_of(model_dir, tensor_parallel_size=2)
    save_engine(recipe, None, tmp_path / "saved")
    for rank in range(2):
        saved, built = Engine.load(tmp_path / "saved", rank), Engine.load(engine_dir, rank)
        assert saved.spec.plans == built.spec.plans and saved.weights(rank).keys() == built.weights(rank).keys()
        assert all(torch.equal(tensor, saved.weights(rank)[name]) for name, tensor in built.weights(rank).items())
    assert saved.tokenizer_dir == tmp_path / "saved"


def test_more_ranks_than_gpus(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaForCausalLM.from_hugging_face(model_dir, mapping=Mapping(4, tp_size=2, pp_size=2)).config
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    check_ranks(config, "cpu")
    with pytest.raises(ConfigError, match="2 x pipeline_parallel_size 2 = 4 ranks need as many GPUs.*has 3; lower"):
        check_ranks(config, "cuda")
    monkeypatch.setenv(ranks.AGENT_VARIABLE, "somewhere")  # other machines have GPUs too
    check_ranks(config, "cuda")


def test_arguments_that_contradict_each_other(model_dir: Path) -> None:
    for arguments, message in (
        ({"auto_parallel": True, "device": "cpu"}, "auto_parallel needs world_size"),
        ({"auto_parallel": True, "tensor_parallel_size": 2}, "tensor_parallel_size is 2; leave it out"),
        ({"world_size": 3, "tensor_parallel_size": 2}, "world_size is 3, but tensor_parallel_size x pipeline_par"),
        ({"pp_partition": [1, 1]}, "pp_partition is.*needs a list of 1 entries"),
        ({"moe_expert_parallel_size": 3, "tensor_parallel_size": 2}, "must equal tp_size 2"),
        ({"gpus_per_node": 0}, "gpus_per_node is 0"),
        ({"worker_timeout_s": 0}, "worker_timeout_s is 0"),
        ({"worker_timeout_s": float("nan")}, "worker_timeout_s is nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(model_dir, **arguments)


def test_auto_parallel_chooses_and_tells(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lamella_builder"):
        recipe = recipe_of(model_dir, auto_parallel=True, world_size=2)
    assert recipe.mapping.world_size == 2
    assert "auto_parallel: LlamaForCausalLM" in caplog.text and "chosen" in caplog.text


def test_the_bench_hands_sizes_on(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("lamella.cli.bench.plan.LLM", lambda model, **arguments: asked.update(arguments))
    chosen = sizes(2, None, None, False, None, None)
    plan = BenchPlan("throughput", str(model_dir), "auto", "auto", 8, 8, 2, 2, sizes=chosen)
    plan.open()
    assert asked["tensor_parallel_size"] == 2 and asked["pipeline_parallel_size"] is None


def test_the_roofline_of_two_gpus_is_that_of_twice_the_rates() -> None:
    hardware = find_hardware(H100)
    assert hardware is not None
    twice = hardware.times(2)
    assert (twice.name, twice.count, twice.bandwidth) == (f"2 x {H100}", 2, 2 * hardware.bandwidth)
    plan = BenchPlan("latency", "m", "auto", "auto", 128, 64, 1, 1)
    one, two = (against_roofline({"time_per_output_token_s": 0.01}, plan, _config(n), H100) for n in (1, 2))
    assert one is not None and two is not None
    assert (one["num_gpus"], two["num_gpus"]) == (1, 2) and two["step_s"] == pytest.approx(one["step_s"] / 2)


def _config(tp_size: int) -> ModelConfig:
    return LlamaConfig(
        architecture="LlamaForCausalLM", model_type="llama", vocab_size=1000, hidden_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64, intermediate_size=1024, dtype="bfloat16",
        max_position_embeddings=512, mapping=Mapping(tp_size, tp_size=tp_size),
    )  # fmt: skip
