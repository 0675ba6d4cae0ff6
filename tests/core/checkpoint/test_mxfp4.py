"""MXFP4 weights: hand-made blocks, what is read of them in parts, and a whole GPT-OSS of packed experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.tiny_models import hf_dir

from lamella_core.checkpoint.block_scales import open_source
from lamella_core.checkpoint.mxfp4 import Mxfp4Source
from lamella_core.errors import CheckpointError
from lamella_core.mapping import Mapping
from lamella_core.models.gpt_oss import GptOssForCausalLM

# Of the OCP Microscaling specification: e2m1 by its bits.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
CASE = ("GptOssForCausalLM", "packable")


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns blocks, scales and the numbers they stand for, of weights [..., K] rounded to them one by one."""
    grouped = weight.unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(grouped.abs().amax(dim=-1, keepdim=True).clamp_min(1e-20))) - 2
    scaled = grouped / 2.0**exponent
    codes = (scaled.unsqueeze(-1) - torch.tensor(E2M1)).abs().argmin(dim=-1)
    values = torch.tensor(E2M1)[codes] * 2.0**exponent
    blocks = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
    return blocks, (exponent.squeeze(-1) + 127).to(torch.uint8), values.flatten(-2)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A directory with the weight "w" [3, 4, 96], and its numbers."""
    weight = torch.randn(3, 4, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 96)
    blocks, scales, values = pack(weight)
    save_file({"w_blocks": blocks, "w_scales": scales, "plain": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    return tmp_path, values


def test_numbers_by_hand(tmp_path: Path) -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, :8] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    for scale, factor in ((127, 1.0), (130, 8.0), (120, 2.0**-7), (0, 2.0**-127), (252, 2.0**125)):
        scales = torch.full((1, 1), scale, dtype=torch.uint8)
        save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
        values = Mxfp4Source(tmp_path).read("w_blocks")
        assert values.dtype == torch.bfloat16 and values.shape == (1, 32)
        assert values[0, :16].double().tolist() == [number * factor for number in E2M1]
        assert (values[0, 16:] == 0).all()


def test_the_directory_says_that_weights_are_packed(packed: tuple[Path, torch.Tensor]) -> None:
    directory, values = packed
    source = open_source(directory)
    assert sorted(source.names()) == ["plain", "w_blocks"]
    assert source.shape("w_blocks") == (3, 4, 96) and source.dtype("w_blocks") == torch.bfloat16
    assert source.dtype("plain") == torch.float32 and source.read("plain").tolist() == [1.0, 1.0]
    assert torch.equal(source.read("w_blocks").double(), values.double())


@pytest.mark.parametrize(
    "cut",
    [
        (slice(1, 2),),
        (slice(None), slice(0, 4, 2), slice(40, 90)),
        (slice(0, 3, 2), slice(1, 5, 2), slice(64, 96)),
        (slice(None), slice(None), slice(3, 70, 3)),
    ],
    ids=str,
)
def test_parts(packed: tuple[Path, torch.Tensor], cut: tuple[slice, ...]) -> None:
    source, expected = Mxfp4Source(packed[0]), packed[1][cut]
    assert torch.equal(source.read("w_blocks", cut).double(), expected.double())
    out = torch.empty(expected.mT.shape)
    source.copy(out, "w_blocks", cut, transpose=True)
    assert torch.equal(out, expected.mT)
    with pytest.raises(CheckpointError, match="the model needs"):
        source.copy(torch.empty(1, 1, 1), "w_blocks", cut)


def test_damage_is_named(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    tensors = load_file(packed[0] / "model.safetensors")
    file, scales = tmp_path / "model.safetensors", tensors.pop("w_scales")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="scales of MXFP4 weights are missing: w_scales"):
        Mxfp4Source(tmp_path)
    save_file({**tensors, "w_scales": scales[:2].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"w_blocks needs uint8 \[3, 4, 3\]"):
        Mxfp4Source(tmp_path)
    save_file({"w_blocks": tensors["w_blocks"][..., :8].contiguous(), "w_scales": scales}, file)
    with pytest.raises(CheckpointError, match="their last dimension is 16"):
        Mxfp4Source(tmp_path)
    scales[0, 0, 0] = 255
    save_file({**tensors, "w_scales": scales}, file)
    with pytest.raises(CheckpointError, match="holds a scale that is no number"):
        Mxfp4Source(tmp_path).read("w_blocks")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write(tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("wide"))


def write(narrow: Path, wide: Path) -> tuple[Path, Path]:
    """Fills the directories with one GPT-OSS: its experts packed, and widened in transformers' layout."""
    source = hf_dir(*CASE)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    kept, stored = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, values = pack(tensors[name].mT)
        del stored[name]
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        kept[name] = values.mT.contiguous()
    save_file(kept, wide / "model.safetensors")
    (wide / "config.json").write_text(json.dumps(config))
    save_file(stored, narrow / "model.safetensors")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (narrow / "config.json").write_text(json.dumps(config))
    return narrow, wide


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mapping", [{}, {"tp_size": 2}, {"tp_size": 2, "moe_ep_size": 2}], ids=str)
def test_packed_experts_load(models: tuple[Path, Path], mapping: dict[str, int], dtype: str) -> None:
    world = mapping.get("tp_size", 1)
    for rank in range(world):
        placed = Mapping(world_size=world, rank=rank, **mapping)
        packed, wide = (GptOssForCausalLM.from_hugging_face(path, dtype=dtype, mapping=placed) for path in models)
        assert not packed.config.quantization.is_quantized
        for name, parameter in wide.named_parameters():
            assert torch.equal(parameter, packed.get_parameter(name)), name


def test_packed_logits_equal_transformers(models: tuple[Path, Path]) -> None:
    from transformers import GptOssForCausalLM as Oracle

    prompt = list(range(5, 17))
    oracle = Oracle.from_pretrained(models[1], dtype=torch.float32, attn_implementation="eager")
    logits = forward_step(
        GptOssForCausalLM.from_hugging_face(models[0], dtype="float32"), ReferenceCache(), {0: prompt}
    )
    with torch.no_grad():
        assert (logits[0] - oracle(torch.tensor([prompt])).logits[0]).abs().max() < 3e-5
