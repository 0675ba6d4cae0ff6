"""Configurations of single architectures: older spellings of config.json, and values that are refused."""

import json

import pytest
from tests.support.tiny_models import write_config

from lamella_core import AutoConfig
from lamella_core.config import FULL, SLIDING
from lamella_core.errors import ConfigError


def of(architecture, model_type, **keys):
    return {"architectures": [architecture], "model_type": model_type, **keys}


def gemma2(**keys):
    return of("Gemma2ForCausalLM", "gemma2", head_dim=8, **keys)


def gemma3(**keys):
    return of("Gemma3ForCausalLM", "gemma3_text", head_dim=8, **keys)


def smollm3(**keys):
    return of("SmolLM3ForCausalLM", "smollm3", **keys)


def exaone4(**keys):
    return of("Exaone4ForCausalLM", "exaone4", **keys)


def read(tmp_path, keys):
    return AutoConfig.from_hugging_face(write_config(tmp_path, **keys))


def test_gemma3_reads_the_older_form_of_two_bases(tmp_path):
    older = {"rope_theta": 3e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 500.0}
    config = read(tmp_path, gemma3(**older, sliding_window_pattern=2))
    assert (config.rope.theta, config.rope.rope_type, config.rope.scaling) == (3e5, "linear", {"factor": 8.0})
    assert (config.local_rope.theta, config.local_rope.rope_type) == (500.0, "default")
    assert config.layer_types == (SLIDING, FULL)


def test_gemma3_reads_the_newer_form_of_two_bases(tmp_path):
    kinds = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5}, SLIDING: {"rope_theta": 500.0}}
    config = read(tmp_path, gemma3(rope_parameters=kinds))
    assert (config.rope.theta, config.rope.rope_type, config.local_rope.theta) == (3e5, "linear", 500.0)


def test_a_published_gemma3_that_sees_leaves_most_of_its_decoder_out(tmp_path):
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
             "text_config": text, "torch_dtype": "bfloat16", "vision_config": {}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = AutoConfig.from_hugging_face(tmp_path)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.num_positions, config.dtype) == (262_208, 131_072, "bfloat16")
    assert (config.eos_token_ids, config.bos_token_id, config.tie_word_embeddings) == ((1, 106), 2, True)
    assert (config.rope.theta, config.rope.scaling, config.local_rope.theta) == (1e6, {"factor": 8.0}, 1e4)
    assert config.layer_types[4:7] == (SLIDING, FULL, SLIDING) and config.sliding_window == 1024
    (tmp_path / "config.json").write_text(json.dumps({**whole, "tie_word_embeddings": False}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 106}')
    config = AutoConfig.from_hugging_face(tmp_path)
    assert (config.eos_token_ids, config.tie_word_embeddings) == ((106,), False)


def test_gemma_means_the_tanh_approximation_by_gelu(tmp_path):
    gemma = of("GemmaForCausalLM", "gemma", head_dim=8)
    assert read(tmp_path / "a", {**gemma, "hidden_act": "gelu"}).hidden_act == "gelu_pytorch_tanh"
    assert read(tmp_path / "b", {**gemma, "hidden_activation": "relu"}).hidden_act == "relu"
    older = write_config(tmp_path / "d", **gemma, hidden_act="silu")
    assert AutoConfig.from_hugging_face(older, hidden_activation=None).hidden_act == "silu"
    config = read(tmp_path / "c", gemma)
    assert config.tie_word_embeddings and config.embedding_scale == 32**0.5


def test_layer_window_is_that_of_the_layers_kind(tmp_path):
    config = read(tmp_path, gemma2(sliding_window=7))
    assert [config.layer_window(i) for i in range(2)] == [7, None]


@pytest.mark.parametrize(
    ("keys", "types"),
    [
        ({"sliding_window_pattern": 3}, (SLIDING, SLIDING, FULL, SLIDING)),
        ({"sliding_window_pattern": "LG"}, (SLIDING, FULL, SLIDING, FULL)),
        ({"sliding_window_pattern": "L"}, (SLIDING, SLIDING, SLIDING, FULL)),
        ({"sliding_window_pattern": None, "sliding_window": None, "layer_types": [FULL] * 4}, (FULL,) * 4),
    ],
)
def test_exaone4_patterns(tmp_path, keys, types):
    assert read(tmp_path, exaone4(num_hidden_layers=4, **keys)).layer_types == types


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (gemma2(final_logit_softcapping=0), "logit_softcap is 0; .* above 0"),
        (gemma2(attn_logit_softcapping="50"), "attention_softcap is '50'; it must be a finite number"),
        (gemma2(query_pre_attn_scalar=0), "query_pre_attn_scalar is 0; .* above 0"),
        (gemma2(layer_types=[FULL]), "layer_types is .*; it needs full_attention or sliding_attention for each of"),
        (gemma2(layer_types=[FULL, "chunked_attention"]), "layer_types is .*chunked_attention"),
        (gemma2(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (gemma3(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0; .* supports None"),
        (gemma3(rope_local_base_freq="x"), "rope_theta is 'x'"),
        (smollm3(no_rope_layers=[1]), "no_rope_layers is .*; it needs 0 or 1 for each of 2 layers"),
        (smollm3(no_rope_layers=[1, 2]), "no_rope_layers is .*; it needs 0 or 1"),
        (smollm3(no_rope_layers=3), "no_rope_layers is 3; it must be a list"),
        (exaone4(sliding_window_pattern=0), "sliding_window_pattern is 0; it must be an integer"),
        (of("GraniteForCausalLM", "granite", logits_scaling=0), "logits_scaling is 0; .* above 0"),
        (of("CohereForCausalLM", "cohere", logit_scale=None, use_qk_norm=1), "use_qk_norm is 1; .* true or false"),
        (of("PhiForCausalLM", "phi", qk_layernorm=True), "qk_layernorm is True; PhiForCausalLM supports False"),
    ],
)
def test_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, keys)


def test_nemotron_nas_sizes_come_from_its_blocks(tmp_path):
    def deci(*blocks):
        halves = [dict(zip(("attention", "ffn"), block)) for block in blocks]
        return of("DeciLMForCausalLM", "nemotron-nas", block_configs=halves, intermediate_size=None)

    nothing, grouped, inner = {"no_op": True}, {"n_heads_in_group": 2}, {"ffn_mult": 13}
    config = read(tmp_path / "a", deci((grouped, nothing), ({"replace_with_linear": True}, inner)))
    assert (config.layer_kv_heads, config.layer_inner) == ((2, -1), (0, 512))
    for name, bad in (
        ("window_length is 5", ({**grouped, "window_length": 5}, inner)),
        ("n_heads_in_group is None", ({}, inner)),
        ("ffn_mult is None", (grouped, {})),
        ("no layer has attention", (nothing, inner)),
    ):
        with pytest.raises(ConfigError, match=name):
            read(tmp_path / name, deci(bad, bad))
