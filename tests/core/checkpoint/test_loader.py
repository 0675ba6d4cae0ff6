"""load_weights: fusing, slicing, casting, and the one error that names everything that does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import hf_dir

from lamella_core.checkpoint.loader import load_weights
from lamella_core.checkpoint.source import WeightSource
from lamella_core.errors import CheckpointError
from lamella_core.mapping import Mapping
from lamella_core.models.gpt2 import GPT2LMHeadModel
from lamella_core.models.llama import LlamaForCausalLM
from lamella_core.models.mixtral import MixtralForCausalLM


@pytest.fixture
def llama() -> Path:
    return hf_dir("LlamaForCausalLM", "grouped")


def copied(directory: Path, target: Path, change: Any) -> Path:
    """Writes ``directory``'s model to ``target`` after ``change(tensors)``."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    return target


def params(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_projections_are_fused_in_order(llama: Path) -> None:
    source, loaded = load_file(llama / "model.safetensors"), params(LlamaForCausalLM.from_hugging_face(llama))
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = torch.cat([source[f"{attention}.{s}_proj.weight"] for s in "qkv"])
        assert torch.equal(loaded[f"layers.{i}.attention.qkv_proj.weight"], qkv)
        gate_up = torch.cat([source[f"{mlp}.{s}_proj.weight"] for s in ("gate", "up")])
        assert torch.equal(loaded[f"layers.{i}.mlp.gate_up_proj.weight"], gate_up)


def test_conv1d_weights_are_transposed() -> None:
    directory = hf_dir("GPT2LMHeadModel", "tied")
    source, loaded = load_file(directory / "model.safetensors"), params(GPT2LMHeadModel.from_hugging_face(directory))
    stored = source["transformer.h.1.attn.c_attn.weight"]
    assert torch.equal(loaded["layers.1.attention.qkv_proj.weight"], stored.t())
    assert "lm_head.weight" not in loaded  # tied: the embedding's


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_hold_slices_of_the_whole(llama: Path, tp: int) -> None:
    whole = params(LlamaForCausalLM.from_hugging_face(llama))
    ranks = [
        params(LlamaForCausalLM.from_hugging_face(llama, mapping=Mapping(world_size=tp, tp_size=tp, rank=rank)))
        for rank in range(tp)
    ]
    down = "layers.0.mlp.down_proj.weight"
    assert torch.equal(torch.cat([rank[down] for rank in ranks], 1), whole[down])
    embedding = torch.cat([rank["embed_tokens.weight"] for rank in ranks])
    assert torch.equal(embedding[:131], whole["embed_tokens.weight"]) and not embedding[131:].any()
    q, k, v = whole["layers.0.attention.qkv_proj.weight"].split([32, 16, 16])
    for rank, own in enumerate(ranks):
        kv = rank * 2 // tp  # key/value head: 2 of them, shared when there are more ranks
        heads = (q.chunk(tp)[rank], k.chunk(2)[kv], v.chunk(2)[kv])
        assert torch.equal(own["layers.0.attention.qkv_proj.weight"], torch.cat(heads))


def test_experts_are_stacked_and_split_over_ranks() -> None:
    directory = hf_dir("MixtralForCausalLM", "top2")
    whole = params(MixtralForCausalLM.from_hugging_face(directory))
    mapping = Mapping(world_size=2, tp_size=2, moe_ep_size=2, rank=1)
    rank = params(MixtralForCausalLM.from_hugging_face(directory, mapping=mapping))
    names = [name for name, tensor in whole.items() if tensor.dim() == 3]
    assert len(names) == 4
    for name in names:
        assert torch.equal(rank[name], whole[name][2:])


def test_values_are_cast_to_the_models_dtype(llama: Path) -> None:
    exact = params(LlamaForCausalLM.from_hugging_face(llama))
    half = params(LlamaForCausalLM.from_hugging_face(llama, dtype="bfloat16"))
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in exact.items())


def test_everything_wrong_is_named_in_one_error(llama: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
        tensors["vision.weight"] = torch.ones(1)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(32, 48)
        tensors["lm_head.weight"] = torch.zeros(131, 32, dtype=torch.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # allowed

    with pytest.raises(CheckpointError) as caught:
        LlamaForCausalLM.from_hugging_face(copied(llama, tmp_path, change))
    lines: dict[str, list[str]] = {}
    title = ""
    for line in str(caught.value).partition("Tensors ")[2].splitlines():
        if line.startswith("  "):
            lines[title].append(line.strip())
        else:
            title = line
            lines[title] = []
    assert list(lines) == ["2 missing:", "3 unexpected:", "2 of wrong shape or dtype:"]
    missing, unexpected, wrong = lines.values()
    assert missing == ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
    assert unexpected == [
        "model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight", "vision.weight"
    ]  # fmt: skip
    assert [line.partition(":")[0] for line in wrong] == ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    assert "shape [32, 48], the configuration needs [48, 32]" in str(caught.value)
    assert "torch.int8" in str(caught.value)


def test_a_failed_load_leaves_the_model_without_memory(llama: Path, tmp_path: Path) -> None:
    config = LlamaForCausalLM.from_hugging_face(llama).config
    model = LlamaForCausalLM.empty(dataclasses.replace(config, intermediate_size=50))
    with pytest.raises(CheckpointError):
        load_weights(model, llama)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    directory = hf_dir("MixtralForCausalLM", "top2")
    gone = next(n for n in load_file(directory / "model.safetensors") if "layers.1" in n and "experts.2." in n)
    with pytest.raises(CheckpointError, match="1 missing") as caught:
        MixtralForCausalLM.from_hugging_face(copied(directory, tmp_path, lambda tensors: tensors.pop(gone)))
    assert gone in str(caught.value)


def test_pipeline_stages_take_their_layers_and_accept_the_rest(llama: Path) -> None:
    whole, seen = params(LlamaForCausalLM.from_hugging_face(llama)), {}
    for rank in range(2):
        stage = LlamaForCausalLM.from_hugging_face(llama, mapping=Mapping(world_size=2, pp_size=2, rank=rank))
        seen |= params(stage)
    assert seen.keys() == whole.keys() and all(torch.equal(seen[name], whole[name]) for name in whole)


def test_progress_ends_at_all_bytes(llama: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = LlamaForCausalLM.from_hugging_face(llama).config
    model = LlamaForCausalLM.empty(config)
    load_weights(model, WeightSource(llama), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (model.weight_bytes(), model.weight_bytes())
    assert calls == sorted(calls) and len(calls) == len(params(model))


def test_a_rank_reads_only_the_slices_it_holds(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    copy = WeightSource.copy

    def counted(self: WeightSource, out: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal read
        read += out.nbytes
        copy(self, out, *args, **kwargs)

    monkeypatch.setattr(WeightSource, "copy", counted)
    model = LlamaForCausalLM.from_hugging_face(llama, mapping=Mapping(world_size=2, tp_size=2, rank=1))
    padding = 2 * 32 * 4  # one row of the embedding and of the output layer
    assert read == model.weight_bytes() - padding
