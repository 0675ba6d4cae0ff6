"""The roofline of mixtures of experts, against numbers computed by hand, and what has no roofline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.tiny_experts import EXPERTS
from tests.support.tiny_latent import LATENT
from tests.support.tiny_models import write_config
from tests.support.tiny_state_space import STATE_SPACE

from lamella.roofline import Hardware, LayerAttention, LayerExperts, ModelShape, Roofline
from lamella_core import AutoConfig
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.quantization.config import QuantConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HIDDEN, INNER, VOCAB = 32, 48, 131  # of the tiny models; 4 query and 2 key/value heads of 8 numbers
ATTENTION = HIDDEN * (32 + 16 + 16) + 32 * HIDDEN
MODEL_TYPES = {
    "MixtralForCausalLM": "mixtral",
    "Llama4ForCausalLM": "llama4_text",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "PhimoeForCausalLM": "phimoe",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "MambaForCausalLM": "mamba",
    "JambaForCausalLM": "jamba",
    "Qwen3NextForCausalLM": "qwen3_next",
}


def config_of(directory: Path, architecture: str, variant: dict) -> ModelConfig:
    directory.mkdir()
    changes = {**variant, "architectures": [architecture], "model_type": MODEL_TYPES[architecture]}
    return AutoConfig.from_hugging_face(write_config(directory, **changes), dtype="bfloat16")


@pytest.fixture
def mixtral(tmp_path) -> ModelConfig:
    return config_of(tmp_path / "mixtral", "MixtralForCausalLM", EXPERTS["MixtralForCausalLM"]["top2"])


def test_shape_of_a_small_mixtral(mixtral):
    model = ModelShape.of(mixtral)
    expert = 3 * HIDDEN * INNER  # gate, up and down
    router = HIDDEN * 4
    assert model.experts == 2 * (LayerExperts(4, 2, params=expert, fp8_params=0, num_bytes=2 * expert),)
    assert model.linear_params == 2 * (ATTENTION + router)
    assert model.linear_bytes == 2 * model.linear_params
    norms = 5 * HIDDEN
    assert model.weight_bytes == 2 * (2 * (ATTENTION + router + 4 * expert) + 2 * VOCAB * HIDDEN + norms)


def test_shape_of_a_small_qwen3_moe_with_a_dense_layer(tmp_path):
    variant = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8,
               "mlp_only_layers": [0]}  # fmt: skip
    model = ModelShape.of(config_of(tmp_path / "qwen3", "Qwen3MoeForCausalLM", variant))
    expert = 3 * HIDDEN * 16
    assert model.experts == (LayerExperts(8, 3, params=expert, fp8_params=0, num_bytes=2 * expert),)
    assert model.linear_params == 2 * ATTENTION + 3 * HIDDEN * INNER + HIDDEN * 8


def test_shared_experts_are_met_by_every_token(tmp_path):
    model = ModelShape.of(config_of(tmp_path / "m", "Qwen2MoeForCausalLM", EXPERTS["Qwen2MoeForCausalLM"]["shared"]))
    shared = 3 * HIDDEN * 40 + HIDDEN  # and its gate
    assert model.linear_params == 2 * (ATTENTION + HIDDEN * 4 + shared)


def test_float8_experts_beside_routers_that_stay(mixtral):
    model = ModelShape.of(replace(mixtral, quantization=QuantConfig("FP8", "FP8")))
    expert, router = 3 * HIDDEN * INNER, HIDDEN * 4
    assert model.experts[0] == LayerExperts(4, 2, params=expert, fp8_params=expert, num_bytes=expert)
    assert model.linear_params - model.linear_fp8_params == 2 * router
    plain = ModelShape.of(mixtral)
    assert plain.weight_bytes - model.weight_bytes == 2 * (ATTENTION + 4 * expert)
    assert model.kv_bytes * 2 == plain.kv_bytes


@pytest.mark.parametrize(("batch", "hit"), [(1, 2), (2, 8 * (1 - 0.75**2)), (1000, 8)])
def test_experts_that_random_routing_hits(batch, hit):
    assert LayerExperts(8, 2, 1, 0, 2).hit(batch) == pytest.approx(hit)


def test_a_step_reads_the_experts_that_are_hit_or_computes_them():
    experts = LayerExperts(8, 2, params=100, fp8_params=0, num_bytes=200)
    layer = LayerAttention(query_width=0, kv_bytes=1, window=None)
    model = ModelShape(50, 0, 100, 0, 0, 2000, (layer, layer), (experts,))
    slow = Roofline(model, Hardware("slow memory", 1e12, 1.0, 1e30, None))
    assert slow.step(2, 10) == pytest.approx(100 + 3.5 * 200 + 2 * 2 * 10)
    weak = Roofline(model, Hardware("slow arithmetic", 1e12, 1e30, 1.0, None))
    assert weak.step(3, 10) == pytest.approx(3 * 2 * (50 + 2 * 100))
    assert 7 / weak.serial(5, 7) == pytest.approx((5 + 6) * 2 * (50 + 2 * 100))  # the first token comes with the prompt
    assert 7 / weak.overlap(5, 7) == pytest.approx((5 + 6) * 2 * (50 + 2 * 100))
    both = Roofline(model, Hardware("both", 1e12, 1.0, 1.0, None))
    assert both.step(3, 0) == pytest.approx(3 * 2 * 50 + max(8 * (1 - 0.75**3) * 200, 3 * 2 * 200))  # kernel by kernel
    alone = 7 / slow.serial(5, 7, 1)
    assert alone == pytest.approx(6 * (100 + 2 * 200) + 2 * (6 * (5 + 7 / 2) + 12))
    assert 7 / slow.overlap(5, 7, 1) == pytest.approx(alone)


def test_published_sizes_of_two_models():
    sizes = {"mixtral-8x7b": (46.7e9, 12.9e9, 32 * (8,)), "qwen3-30b-a3b": (30.5e9, 3.35e9, 48 * (128,))}
    for name, (total, active, experts) in sizes.items():
        config = AutoConfig.from_hugging_face(BENCHMARKS / "configs" / name)
        model = ModelShape.of(config)
        assert tuple(layer.num_experts for layer in model.experts) == experts
        assert model.weight_bytes / 2 == pytest.approx(total, rel=2e-3)
        met = model.linear_params + 2 * model.head_params + sum(e.top_k * e.params for e in model.experts)
        assert met == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize("architecture", [name for name in EXPERTS if name in MODEL_TYPES])
def test_every_mixture_has_a_shape(tmp_path, architecture):
    for number, variant in enumerate(EXPERTS[architecture].values()):
        config = config_of(tmp_path / str(number), architecture, variant)
        model = ModelShape.of(config)
        assert model.experts
        held = model.linear_bytes + model.head_bytes + sum(e.num_experts * e.num_bytes for e in model.experts)
        assert 0 <= model.weight_bytes - held + (model.head_bytes if config.tie_word_embeddings else 0) < held


REFUSED = {
    "DeepseekV2ForCausalLM": (LATENT, "latent attention"),
    "DeepseekV3ForCausalLM": (LATENT, "latent attention"),
    "MambaForCausalLM": (STATE_SPACE, "states"),
    "JambaForCausalLM": (STATE_SPACE, "states"),
    "Qwen3NextForCausalLM": (STATE_SPACE, "states"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_layers_of_unknown_cost_are_refused(tmp_path, architecture):
    tiny, what = REFUSED[architecture]
    config = config_of(tmp_path / "model", architecture, next(iter(tiny[architecture].values())))
    with pytest.raises(ConfigError, match=f"{architecture} .*{what}"):
        ModelShape.of(config)


@pytest.mark.parametrize("isl", [4, 16, 20, 50])
def test_chunked_attention_sees_its_own_chunk(isl):
    layer = LayerAttention(1, 1, window=16, is_chunked=True)
    seen = sum((isl + i) % 16 + 0.5 for i in range(40)) / 40
    assert layer.mean_visible(isl, 40) == pytest.approx(seen)
    assert layer.causal_area(isl) == pytest.approx(2 * sum(i % 16 + 0.5 for i in range(isl)))
    assert layer.visible(20) == 4
