"""Lamella checkpoints: what is saved comes back, rank by rank, and what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_models import hf_dir

from lamella_core.auto import AutoModelForCausalLM
from lamella_core.checkpoint.formats import detect_format
from lamella_core.checkpoint.native import SCHEMA_VERSION, read_checkpoint_config
from lamella_core.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from lamella_core.errors import CheckpointError
from lamella_core.mapping import Mapping
from lamella_core.models.gpt2 import GPT2LMHeadModel
from lamella_core.models.llama import LlamaForCausalLM


@pytest.fixture
def llama() -> Path:
    return hf_dir("LlamaForCausalLM", "rope_yarn")


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    LlamaForCausalLM.from_hugging_face(llama, dtype="bfloat16").save_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same(a: Any, b: Any) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("load", [LlamaForCausalLM.from_checkpoint, AutoModelForCausalLM.from_checkpoint])
def test_a_saved_model_comes_back(llama: Path, checkpoint: Path, load: Any) -> None:
    original, back = LlamaForCausalLM.from_hugging_face(llama, dtype="bfloat16"), load(checkpoint)
    assert same(original, back) and back.config == original.config
    assert detect_format(checkpoint) == "checkpoint"
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json", "rank0.safetensors"]


def test_ranks_are_written_one_after_another(llama: Path, tmp_path: Path) -> None:
    ranks = []
    for rank in range(4):
        mapping = Mapping(world_size=4, tp_size=2, pp_size=2, rank=rank)
        ranks.append(LlamaForCausalLM.from_hugging_face(llama, mapping=mapping))
        ranks[-1].save_checkpoint(tmp_path)
    for rank, original in enumerate(ranks):
        back = LlamaForCausalLM.from_checkpoint(tmp_path, rank=rank)
        assert same(original, back) and back.config.mapping.rank == rank
    with pytest.raises(CheckpointError, match="4 ranks; there is no rank 4"):
        LlamaForCausalLM.from_checkpoint(tmp_path, rank=4)
    with pytest.raises(CheckpointError, match="ranks of another model"):
        LlamaForCausalLM.from_hugging_face(llama, mapping=Mapping(world_size=2, tp_size=2)).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"ranks of another model \(rank1.safetensors, rank2.*choose an empty"):
        LlamaForCausalLM.from_hugging_face(llama).save_checkpoint(tmp_path)
    assert same(ranks[3], LlamaForCausalLM.from_checkpoint(tmp_path, rank=3))


def test_directories_that_are_no_checkpoint(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="load a Hugging Face directory with from_hugging_face"):
        AutoModelForCausalLM.from_checkpoint(llama)
    with pytest.raises(CheckpointError, match="missing is no Lamella checkpoint: there is no .*check the path"):
        LlamaForCausalLM.from_checkpoint(tmp_path / "missing")


def test_weights_are_mapped_not_copied(checkpoint: Path) -> None:
    model = LlamaForCausalLM.from_checkpoint(checkpoint)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    ranges = [line.split()[0] for line in maps.read_text().splitlines() if line.endswith("rank0.safetensors")]
    bounds = [tuple(int(end, 16) for end in text.split("-")) for text in ranges]
    for parameter in model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in bounds)


def test_the_wrong_class_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a LlamaForCausalLM, not a GPT2LMHeadModel"):
        GPT2LMHeadModel.from_checkpoint(checkpoint)


def test_a_foreign_directory_is_not_overwritten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="another kind of model"):
        LlamaForCausalLM.from_hugging_face(llama).save_checkpoint(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama"}


def damage(checkpoint: Path, change: Any) -> None:
    path = checkpoint / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(lamella_checkpoint=SCHEMA_VERSION + 1), "Upgrade Lamella"),
        (lambda d: d.update(lamella_checkpoint="x"), "schema 'x'"),
        (lambda d: d.pop("lamella_checkpoint"), "lacks 'lamella_checkpoint'"),
        (lambda d: d.pop("config"), "names no architecture"),
        (lambda d: d["config"].pop("hidden_size"), "hidden_size"),
        (lambda d: d["config"].update(hidden_size=-1), "hidden_size"),
        (lambda d: d["config"].update(mapping=3), "damaged"),
        (lambda d: d["config"].update(extra=1), "extra"),
        (lambda d: d["config"].update(vocab_size=132), "wrong: embed_tokens.weight"),
        (lambda d: d["config"].update(num_hidden_layers=3), "missing: layers.2.mlp.down_proj.weight"),
    ],
)
def test_a_damaged_config_is_named(checkpoint: Path, change: Any, message: str) -> None:
    damage(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_checkpoint(checkpoint)


def test_a_missing_or_truncated_rank_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "rank0.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=r"rank0\.safetensors is truncated"):
        LlamaForCausalLM.from_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rank0\.safetensors is missing"):
        LlamaForCausalLM.from_checkpoint(checkpoint)


def test_tensors_beside_the_model_are_named(checkpoint: Path) -> None:
    file = SafetensorsFile(checkpoint / "rank0.safetensors")
    tensors = {name: file.tensor(name).clone() for name in file.tensors}
    write_safetensors(checkpoint / "rank0.safetensors", {**tensors, "stray": torch.ones(1)})
    with pytest.raises(CheckpointError, match="unexpected: stray"):
        LlamaForCausalLM.from_checkpoint(checkpoint)


def test_the_config_is_read_alone(checkpoint: Path) -> None:
    (checkpoint / "rank0.safetensors").unlink()
    model_class, config = read_checkpoint_config(checkpoint)
    assert model_class is LlamaForCausalLM and config.dtype == "bfloat16" and dataclasses.is_dataclass(config)
