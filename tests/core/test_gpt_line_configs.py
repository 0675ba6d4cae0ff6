"""Configurations of the GPT line: older spellings of config.json, and values that are refused."""

import pytest
from tests.support.tiny_models import write_config

from lamella_core import AutoConfig, AutoModelForCausalLM
from lamella_core.errors import ConfigError
from lamella_core.mapping import Mapping


def of(architecture, model_type, **keys):
    return {"architectures": [architecture], "model_type": model_type, **keys}


def neox(**keys):
    return of("GPTNeoXForCausalLM", "gpt_neox", num_key_value_heads=None, **keys)


def falcon(**keys):
    return of("FalconForCausalLM", "falcon", **keys)


def mpt(**attention):
    return of("MPTForCausalLM", "mpt", d_model=32, n_heads=4, n_layers=2, attn_config=attention)


def gptj(**keys):
    return of("GPTJForCausalLM", "gptj", n_embd=32, n_head=4, n_layer=2, n_positions=64, rotary_dim=4, **keys)


def read(tmp_path, keys):
    return AutoConfig.from_hugging_face(write_config(tmp_path, **keys))


def test_neox_reads_the_older_names_of_its_rotation(tmp_path):
    config = read(tmp_path / "a", neox(rotary_pct=0.5, rotary_emb_base=500))
    assert (config.rope.rotary_dim, config.rope.theta) == (4, 500)
    assert read(tmp_path / "b", neox()).rope.rotary_dim == 2
    newer = {"rope_theta": 700.0, "partial_rotary_factor": 1.0}
    assert read(tmp_path / "c", neox(rope_parameters=newer)).rope.rotary_dim == 8


@pytest.mark.parametrize(
    ("keys", "kv_heads", "is_parallel", "norms"),
    [
        (of("RWForCausalLM", "RefinedWeb", n_head_kv=2, n_head=4, n_layer=2), 2, True, 2),
        (of("RWForCausalLM", "RefinedWebModel", n_head=4, n_layer=2), 1, True, 1),
        (of("RWForCausalLM", "RefinedWebModel", alibi=True, multi_query=False, parallel_attn=False), 4, False, 1),
        (falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1), 2, True, 1),
        (falcon(new_decoder_architecture=True, num_kv_heads=None), 4, True, 2),
    ],
)
def test_falcon_kinds(tmp_path, keys, kv_heads, is_parallel, norms):
    config = read(tmp_path, keys)
    assert (config.num_key_value_heads, config.parallel_attn) == (kv_heads, is_parallel)
    assert config.num_ln_in_parallel_attn == norms and (config.rope is None) == config.alibi
    assert config.model_type == keys["model_type"]


def test_bloom_takes_any_head_count_but_not_any_split(tmp_path):
    directory = write_config(tmp_path, **of("BloomForCausalLM", "bloom", n_embed=42, n_head=7, n_layer=2))
    config = AutoConfig.from_hugging_face(directory)
    assert (config.hidden_size, config.intermediate_size, config.max_position_embeddings) == (42, 168, 2048)
    with pytest.raises(ConfigError, match="tp_size 2 does not divide num_attention_heads 7"):
        AutoModelForCausalLM.from_hugging_face(directory, load_format="dummy", mapping=Mapping(world_size=2, tp_size=2))


def test_opt_norms_and_widths(tmp_path):
    keys = of("OPTForCausalLM", "opt", ffn_dim=48)
    plain = read(tmp_path / "a", {**keys, "word_embed_proj_dim": 32})
    assert plain.embedding_size is None and plain.final_norm
    narrow = read(tmp_path / "b", {**keys, "word_embed_proj_dim": 24, "do_layer_norm_before": False})
    assert narrow.embedding_size == 24 and not narrow.final_norm


def test_published_mpt_reads_its_attention(tmp_path):
    config = read(tmp_path, mpt(attn_type="grouped_query_attention", kv_n_heads=2, qk_ln=True, clip_qkv=8))
    assert (config.num_key_value_heads, config.qk_ln, config.clip_qkv) == (2, True, 8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (neox(rotary_pct="x"), "partial_rotary_factor is 'x'"),
        (neox(use_parallel_residual=1), "use_parallel_residual is 1; .* true or false"),
        (falcon(new_decoder_architecture=True, parallel_attn=False), "new_decoder_architecture needs parallel_attn"),
        (falcon(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn 2 needs new_decoder_architecture"),
        (falcon(new_decoder_architecture=True, num_ln_in_parallel_attn=3), "num_ln_in_parallel_attn is 3"),
        (falcon(alibi="yes"), "alibi is 'yes'; .* true or false"),
        (mpt(alibi=False), "attn_config: alibi is False; .* supports True"),
        (mpt(prefix_lm=True), "attn_config: prefix_lm is True"),
        (mpt(attn_type="grouped_query_attention"), "attn_config lacks 'kv_n_heads'"),
        (mpt(attn_type="grouped_query_attention", kv_n_heads=3), "not a multiple of num_key_value_heads 3"),
        (mpt(attn_type="linear"), "attn_type is 'linear'"),
        (mpt(clip_qkv="8"), "clip_qkv is '8'; it must be a finite number"),
        ({**mpt(), "attn_config": "x"}, "attn_config is 'x'; it must be an object"),
        ({**mpt(), "no_bias": False}, "no_bias is False; .* supports True"),
        ({**gptj(), "rotary_dim": 3}, "rotary_dim is 3; .* even"),
        ({**gptj(), "rotary_dim": 16}, "rotary_dim 16 exceeds head_dim 8"),
        (of("OPTForCausalLM", "opt"), "lacks 'ffn_dim'"),
        (of("GPT2LMHeadCustomModel", "gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=64,
            attention_head_type="grouped"), "attention_head_type is 'grouped'"),
    ],
)  # fmt: skip
def test_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, keys)
