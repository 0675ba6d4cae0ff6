"""Configurations of DeepSeek's models and of those of their kind, routing within groups, and tensors left unread."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import hf_dir, write_config

from lamella_core import AutoConfig, AutoModelForCausalLM, CheckpointError, ConfigError
from lamella_core.layers.group_routing import BiasedGroupRouter, GroupRouter
from lamella_core.models.registry import get_model_class

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
SIZES = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
         "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
         "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
KIMI_K2 = {  # sizes of the published model, with fewer layers and experts
    "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0, "dtype": "bfloat16",
    "max_position_embeddings": 131072, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "moe_layer_freq": 1, "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "rope_theta": 50000.0,
    "rope_scaling": {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]},
}  # fmt: skip


def read(tmp_path, architecture, **keys):
    model_type = "deepseek_v2" if architecture == V2 else "deepseek_v3"
    fields = {**SIZES, "architectures": [architecture], "model_type": model_type, **keys}
    return AutoConfig.from_hugging_face(write_config(tmp_path, **fields))


def test_fields(tmp_path):
    lite = read(tmp_path / "a", V2, n_shared_experts=0)
    assert (lite.head_dim, lite.num_key_value_heads, lite.dense_layers) == (28, 1, (0,))
    assert lite.num_shared_experts is None and (lite.n_group, lite.topk_group) == (1, 1)
    assert lite.attention_scale == 20**-0.5
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    limited = read(tmp_path / "b", V2, **groups)
    assert (limited.n_group, limited.topk_group, limited.rope.interleaved) == (4, 2, True)
    assert (read(tmp_path / "c", V2, n_group=4, topk_group=2).n_group, limited.norm_topk_prob) == (1, False)
    split = read(tmp_path / "d", V3, rope_interleave=False, n_group=4, topk_group=2)
    assert (split.n_group, split.norm_topk_prob, split.rope.interleaved) == (4, True, False)


def test_yarn_sharpens_all_dimensions(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
    plain = read(tmp_path / "a", V3, rope_parameters={**yarn, "mscale": 1.0})
    assert plain.attention_scale == 20**-0.5
    sharp = read(tmp_path / "b", V3, rope_parameters={**yarn, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert sharp.attention_scale == pytest.approx(20**-0.5 * 1.3688879454113936**2)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        (V2, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob is True"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        (V3, {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        (V3, {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        (V3, {"n_group": 4}, "n_group is 4 and topk_group None; give both or none"),
        (V3, {"kv_lora_rank": 0}, "kv_lora_rank"),
        (V3, {"qk_rope_head_dim": 7}, "rotary_dim is 7"),
    ],
)
def test_what_cannot_run_is_refused(architecture, fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, architecture, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_group": 3, "topk_group": 2}, "n_group 3 does not divide the 8 experts"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"n_group": 4, "topk_group": 1}, "num_experts_per_tok 3 exceeds the 2 experts of 1 groups"),
        ({"n_group": 8, "topk_group": 4}, "leaves one expert to a group"),
    ],
)
def test_impossible_groups_are_refused(fields, message, tmp_path):
    config = read(tmp_path, V3, **fields)
    with pytest.raises(ConfigError, match=message):
        get_model_class(V3).empty(config)


def test_groups_limit_the_choice(tmp_path):
    """By hand: the best expert of all is in a group that is left out where two good ones count for more."""
    config = read(tmp_path, V3)
    scores = torch.tensor([[3.0, -9.0, 1.0, 1.5, 0.5, 0.4, -1.0, 2.0]])
    groups = {"num_groups": 4, "top_groups": 2}
    by_best = GroupRouter(config, 8, 2, name="router", **groups, weight_scale=2.0)
    experts, weights = by_best.choose(scores)
    assert experts.tolist() == [[0, 7]]
    torch.testing.assert_close(weights, 2.0 * torch.softmax(scores, -1)[:, [0, 7]])
    by_two = BiasedGroupRouter(config, 8, 2, name="router", renormalize=True, **groups, weight_scale=0.5)
    by_two.correction_bias = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
    assert by_two.choose(scores)[0].tolist() == [[3, 2]]  # 0.82 + 0.73 and 0.62 + 0.60; 0.95 + 0.00 and 0.27 + 0.88
    by_two.correction_bias[7] = 1.0
    experts, weights = by_two.choose(scores)
    assert experts.tolist() == [[7, 3]]
    chosen = torch.sigmoid(scores)[0, [7, 3]]  # without the bias
    torch.testing.assert_close(weights[0], 0.5 * chosen / chosen.sum())


@pytest.mark.parametrize("said", [True, False])
def test_layers_that_guess_further_tokens_are_left_unread(said, tmp_path):
    source = hf_dir(V3, "yarn_groups")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    further = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if "layers.1." in name}
    further["model.layers.2.eh_proj.weight"] = torch.zeros(32, 64)
    save_file({**tensors, **further}, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    config["num_nextn_predict_layers"] = int(said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if said:
        model = AutoModelForCausalLM.from_hugging_face(tmp_path)
        assert model.config.num_nextn_predict_layers == 1 and list(model.layers) == ["0", "1"]
    else:
        with pytest.raises(CheckpointError, match=r"layers\.2\.eh_proj"):
            AutoModelForCausalLM.from_hugging_face(tmp_path)


def test_kimi_k2_has_these_sizes(tmp_path):
    config = AutoConfig.from_hugging_face(write_config(tmp_path, architectures=[V3], **KIMI_K2))
    assert config.model_type == "kimi_k2" and config.num_nextn_predict_layers is None
    model = get_model_class(V3).empty(config)
    shapes = {name: tuple(p.shape) for name, p in model.layers["1"].named_parameters()}
    assert shapes["attention.qkv_proj.weight"] == (1536 + 64 + 512, 7168)
    assert shapes["attention.q_up.weight"] == (64 * 192, 1536)
    assert shapes["attention.k_up.weight"] == (64, 512, 128)
    assert shapes["attention.v_up.weight"] == (64, 128, 512)
    assert shapes["mlp.experts.gate_up_proj.weight"] == (384, 4096, 7168)
    assert [spec.cache_width for spec in model.attention_specs()] == [576, 576]
    assert model.config.quantization.quant_algo is None and model.num_parameters() > 19e9
