"""Configurations of mixtures of experts and of Qwen-1, InternLM and Baichuan: what they mean, and what is refused."""

import math

import pytest
import torch
from tests.support.tiny_models import write_config

from lamella_core import AutoConfig
from lamella_core.errors import ConfigError
from lamella_core.layers.rotary import RotaryEmbedding, rotary_tables
from lamella_core.rope_config import RopeConfig

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def of(architecture, model_type, **keys):
    return {"architectures": [architecture], "model_type": model_type, **keys}


def qwen2_moe(**keys):
    return of("Qwen2MoeForCausalLM", "qwen2_moe", **{**EXPERTS, **keys})


def baichuan(**keys):
    return of("BaichuanForCausalLM", "baichuan", **keys)


def internlm(**keys):
    return of("InternLMForCausalLM", "internlm", **keys)


def qwen(**keys):
    return of("QWenLMHeadModel", "qwen", kv_channels=8, **keys)


def read(tmp_path, keys, **overrides):
    return AutoConfig.from_hugging_face(write_config(tmp_path, **keys), **overrides)


def test_layers_without_experts(tmp_path):
    assert read(tmp_path / "a", qwen2_moe()).dense_layers == ()
    assert read(tmp_path / "b", qwen2_moe(decoder_sparse_step=2)).dense_layers == (0,)
    every = read(tmp_path / "c", qwen2_moe(decoder_sparse_step=2, mlp_only_layers=[1]))
    assert every.dense_layers == (0, 1)


def test_qwen2_moe_windows_every_other_lower_layer(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 7, "num_hidden_layers": 4}
    assert read(tmp_path / "a", qwen2_moe(**window, max_window_layers=3)).sliding_layers == (0, 2)
    assert read(tmp_path / "b", qwen2_moe(**window, max_window_layers=2)).sliding_layers == (0,)
    off = read(tmp_path / "c", qwen2_moe(sliding_window=0))
    assert off.sliding_layers == () and off.sliding_window is None


def test_baichuan_has_alibi_without_rotary_positions(tmp_path):
    first = read(tmp_path / "a", baichuan())
    assert first.rope is not None and first.max_position_embeddings == 64 and not first.normalized_head
    large = baichuan(max_position_embeddings=None, model_max_length=4096)
    assert read(tmp_path / "b", large).rope is None
    assert read(tmp_path / "b", large).max_position_embeddings == 4096


def test_baichuan_2_is_known_by_its_vocabulary_or_loss(tmp_path):
    assert read(tmp_path / "a", baichuan(vocab_size=125696)).normalized_head
    assert read(tmp_path / "b", baichuan(z_loss_weight=0)).normalized_head
    assert not read(tmp_path / "b", baichuan(z_loss_weight=0), normalized_head=False).normalized_head


def test_internlm_rotary(tmp_path):
    plain = read(tmp_path / "a", internlm(rotary={"type": "origin", "base": 500}))
    assert (plain.rope.rope_type, plain.rope.theta) == ("default", 500)
    grows = read(tmp_path / "b", internlm(rotary={"type": "dynamic", "base": 500}))
    assert (grows.rope.rope_type, grows.rope.scaling) == ("dynamic", {"factor": 1.0})
    assert read(tmp_path / "c", internlm()).rope.rope_type == "default"


def test_qwen_positions(tmp_path):
    config = read(tmp_path / "a", qwen(seq_length=32, rotary_emb_base=500))
    assert (config.rope.rope_type, config.rope.logn_length, config.intermediate_size) == ("qwen_dynamic", 32, 24)
    plain = read(tmp_path / "b", qwen(use_dynamic_ntk=False, use_logn_attn=False))
    assert (plain.rope.rope_type, plain.rope.logn_length) == ("default", None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (qwen2_moe(mlp_only_layers="0"), "mlp_only_layers"),
        (qwen2_moe(mlp_only_layers=["0"]), "mlp_only_layers"),
        (qwen2_moe(num_experts=0), "num_experts"),
        (qwen2_moe(layer_types=["sliding_attention"] * 2), "use_sliding_window"),
        (of("PhimoeForCausalLM", "phimoe", num_experts_per_tok=3), "num_experts_per_tok is 3"),
        (internlm(rotary="dynamic"), "rotary is 'dynamic'"),
        (internlm(rotary={"type": "linear"}), "rotary is"),
        (baichuan(tie_word_embeddings=True), "tie_word_embeddings"),
        (qwen(intermediate_size=47), "must be even"),
        (qwen(scale_attn_weights=False), "scale_attn_weights"),
        (qwen(rotary_pct="all"), "rotary_pct"),
    ],
)
def test_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, keys)


def test_longrope_amplitudes_change_at_the_original_length():
    scaling = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "factor": 2.0, "short_mscale": 1.25,
               "long_mscale": 1.5, "original_max_position_embeddings": 4}  # fmt: skip
    rope = RopeConfig(rotary_dim=4, theta=100.0, rope_type="longrope", scaling=scaling)
    cos, sin = rotary_tables(rope, 6, 8)
    amplitude = (cos.square() + sin.square()).sqrt()
    assert torch.allclose(amplitude[:4], torch.tensor(1.25)) and torch.allclose(amplitude[4:], torch.tensor(1.5))
    assert math.isclose(float(sin[3, 1]), 1.25 * math.sin(3 / 20), rel_tol=1e-6)
    assert math.isclose(float(sin[5, 1]), 1.5 * math.sin(5 / 40), rel_tol=1e-6)
    all_long, _ = rotary_tables(rope, 6, 8, max_seq_len=8)
    assert math.isclose(float(all_long[0, 0]), 1.5, rel_tol=1e-6)


def test_queries_grow_by_logarithms_beyond_the_trained_length():
    rotary = RotaryEmbedding(RopeConfig(rotary_dim=4, logn_length=8), 64)
    scale = rotary(torch.tensor([0, 7, 8, 63])).query_scale
    assert torch.allclose(scale.flatten(), torch.tensor([1.0, 1.0, math.log(9, 8), 2.0]))


def test_qwen_bases_grow_in_steps():
    rope = RopeConfig(rotary_dim=4, rope_type="qwen_dynamic", scaling={"original_max_position_embeddings": 4})
    _, sin = rotary_tables(rope, 17, 64)
    for position, alpha in ((3, 1), (4, 3), (7, 3), (8, 7), (15, 7), (16, 15)):
        base = 10000.0 * alpha**2
        assert math.isclose(float(sin[position, 1]), math.sin(position * base**-0.5), rel_tol=1e-5)
