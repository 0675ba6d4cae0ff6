"""Layers by themselves: activations, rotary tables, norms, vocabulary matrices, mixture of experts."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tests.support.tiny_models import BASE
from transformers.activations import ACT2FN

from lamella_core.context import SingleRank
from lamella_core.errors import CheckpointError, ConfigError
from lamella_core.kernels.matmul import default_plan, to_layout
from lamella_core.layers.activation import gated, get_activation
from lamella_core.layers.embedding import LMHead, VocabParallelEmbedding
from lamella_core.layers.moe import MoE
from lamella_core.layers.norm import LayerNorm
from lamella_core.layers.parameter import set_parameter
from lamella_core.layers.rotary import RotaryEmbedding, rotary_tables
from lamella_core.models.llama import LlamaConfig
from lamella_core.models.mixtral import MixtralConfig
from lamella_core.rope_config import RopeConfig

NAMES = ["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2"]


class Context:
    tp = SingleRank()


def tiny_config(cls=LlamaConfig, **changes):
    fields = {k: v for k, v in BASE.items() if k != "eos_token_id"}
    return cls(**{"architecture": "X", "model_type": "x", "head_dim": 8, **fields, **changes})


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(module.named_parameters()):
        set_parameter(module, name, torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def check_rows_independent(function, features):
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x = torch.randn(67, features, generator=torch.Generator().manual_seed(1)) * 3
            together = function(x)
            for row in (0, 1, 31, 66):
                assert torch.equal(together[row], function(x[row : row + 1].clone())[0])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_activation_equals_transformers(name):
    x = torch.linspace(-100, 100, 4001)
    assert torch.allclose(get_activation(name)(x), ACT2FN[name](x), atol=2e-6, rtol=2e-6)
    half = x.bfloat16()
    assert get_activation(name)(half).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("features", [10, 44, 768])
def test_activation_rows_are_independent(name, features):
    check_rows_independent(get_activation(name), features)
    check_rows_independent(gated(name), features)


def test_layer_norm_rows_are_independent():
    norm = filled(LayerNorm(44, 1e-5, torch.float32))
    check_rows_independent(lambda x: norm(x, x)[0], 44)


def test_unknown_activation():
    with pytest.raises(ConfigError, match="did you mean 'gelu_new'"):
        get_activation("gelu_nwe")


ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.8},
    "longrope": {"factor": 8.0, "original_max_position_embeddings": 4096,
                 "short_factor": [1.0 + i / 99 for i in range(32)], "long_factor": [2.0 + i for i in range(32)]},
    "dynamic": {"factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_tables_equal_transformers(kind):
    rope = RopeConfig(theta=500000.0, rotary_dim=64, rope_type=kind, scaling=ROPES[kind])
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=32768,
        rope_parameters={"rope_type": kind, "rope_theta": 500000.0, **ROPES[kind]},
    )  # fmt: skip
    oracle = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = torch.arange(4000)
    cos, sin = oracle(torch.zeros(1), positions[None])
    ours = rotary_tables(rope, 4000, 32768)
    assert torch.equal(ours[0], cos[0, :, :32]) and torch.equal(ours[1], sin[0, :, :32])
    late = torch.tensor([[40000]])
    rotation = RotaryEmbedding(rope, 32768)(late[0])
    assert torch.allclose(rotation.cos, oracle(torch.zeros(1), late)[0][0, :, :32], atol=1e-6)


def test_longrope_chooses_by_longest_sequence():
    rope = RopeConfig(rotary_dim=64, rope_type="longrope", scaling=ROPES["longrope"])
    rotary, positions = RotaryEmbedding(rope, 32768), torch.tensor([5])
    short = rotary(positions).cos
    rotary.set_max_seq_len(4096)
    assert torch.equal(rotary(positions).cos, short)
    rotary.set_max_seq_len(4097)
    assert not torch.equal(rotary(positions).cos, short)


def test_rotary_grows_and_keeps_bits():
    rotary = RotaryEmbedding(RopeConfig(rotary_dim=8), 64)
    first = rotary(torch.tensor([7, 1])).cos
    rotary(torch.tensor([5000]))
    assert torch.equal(rotary(torch.tensor([7, 1])).cos, first)


def test_rotary_rejects_unknown_type_and_odd_size():
    with pytest.raises(ConfigError, match="rope type is 'spiral'"):
        rotary_tables(RopeConfig(rotary_dim=8, rope_type="spiral"), 4, 4)
    with pytest.raises(ConfigError, match="rotary_dim is 7"):
        RotaryEmbedding(RopeConfig(rotary_dim=7), 4)


@pytest.mark.parametrize("layout", ["rows", "panel16"])
def test_tied_head_shares_the_embedding_in_any_layout(layout):
    config = tiny_config(tie_word_embeddings=True)
    embedding = filled(VocabParallelEmbedding(config))
    head = LMHead(config, tied_to=embedding)
    rows = embedding.weight.data
    ids, hidden = torch.tensor([0, 130, 17, 17]), torch.randn(3, 32)
    set_parameter(embedding, "weight", to_layout(rows, layout))
    embedding.plan = default_plan(torch.float32, 131, 32, batch_invariant=True, layout=layout)
    assert not list(head.parameters())
    assert torch.equal(embedding(ids, Context()), rows[ids])
    assert torch.allclose(head(hidden, Context()), hidden @ rows.T, atol=1e-5)


def test_experts_rows_are_independent():
    config = tiny_config(MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    moe = filled(MoE(config, num_experts=4, top_k=2, inner=48, name="moe"))
    check_rows_independent(lambda x: moe(x, Context()), 32)


def test_no_tokens_pass_through_experts():
    config = tiny_config(MixtralConfig)
    moe = filled(MoE(config, num_experts=4, top_k=2, inner=48, name="moe"))
    assert moe(torch.zeros(0, 32), Context()).shape == (0, 32)


def test_router_rejects_too_many_experts_per_token():
    with pytest.raises(ConfigError, match="num_experts_per_tok is 5"):
        MoE(tiny_config(MixtralConfig), num_experts=4, top_k=5, inner=48, name="moe")


def test_parameters_keep_their_shard():
    embedding = filled(VocabParallelEmbedding(tiny_config()))
    assert embedding.weight.shard.shape == (131, 32) and not embedding.weight.requires_grad
    twin = copy.deepcopy(embedding)
    assert twin.weight.shard == embedding.weight.shard
    assert twin.weight.data_ptr() != embedding.weight.data_ptr()
    with pytest.raises(CheckpointError, match="no parameter 'bias'"):
        set_parameter(embedding, "bias", torch.zeros(1))
