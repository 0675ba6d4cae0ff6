"""AutoConfig and AutoModelForCausalLM: what config.json may say, and the errors for what it may not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import huggingface_hub
import pytest
import torch
from tests.support.tiny_models import hf_dir, write_config

import lamella_core
from lamella_core import AutoConfig, AutoModelForCausalLM, CheckpointError, ConfigError, Mapping, UnsupportedModelError
from lamella_core.hub import resolve_model_dir
from lamella_core.models.gpt2 import GPT2LMHeadModel
from lamella_core.models.llama import LlamaForCausalLM
from lamella_core.models.qwen2 import Qwen2ForCausalLM


def test_fields_of_a_llama(tmp_path):
    config = AutoConfig.from_hugging_face(write_config(tmp_path, torch_dtype="bfloat16", dtype=None))
    assert (config.architecture, config.model_type, config.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert (config.num_key_value_heads, config.head_dim, config.eos_token_ids) == (2, 8, (2,))
    assert config.rope.theta == 10000.0 and config.rope.rotary_dim == 8


def test_old_and_new_rope_keys_agree(tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    old = write_config(tmp_path / "old", rope_theta=5000.0, rope_scaling=scaling)
    new = write_config(tmp_path / "new", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    assert AutoConfig.from_hugging_face(old) == AutoConfig.from_hugging_face(new)


_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
_MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "spiral"}}, "rope type is 'spiral'; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_parameters is 'linear'; it must be an object"),
        ({"hidden_act": "sillu"}, "hidden_act.*'sillu'.*did you mean 'silu'"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"architectures": None}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"num_key_value_heads": 8}, "num_attention_heads 4 is not a multiple of num_key_value_heads 8"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be an integer"),
        ({"head_dim": float("nan")}, "head_dim is nan; it must be an integer"),
        ({"head_dim": 7}, "rotary_dim is 7; .*even"),
        ({"vocab_size": 10**30}, r"vocab_size is 10+; it must be an integer from 1 to"),
        ({"hidden_size": 2**31 - 8, "intermediate_size": 2**31 - 1}, "no model is that large"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; .* to 10000"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps is '1e-5'; it must be a finite number"),
        ({"rms_norm_eps": float("inf")}, "norm_eps is inf; it must be a finite number"),
        ({"hidden_act": ["silu"]}, r"hidden_act.*\['silu'\]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is 'x'; it must be an integer"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a finite number above 0"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope type is .*linear"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "linear rope's factor is '2'; it must be a finite"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "linear rope's factor is 0; .* above 0"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": -3}}, "is -3; .* above 0"),
        ({"rope_scaling": {"type": "yarn", "truncate": "no"}}, "truncate is 'no'; it must be true or false"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "a list of 4 numbers"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}, "not below"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ per kind of layer"),
        ({"partial_rotary_factor": 2.0}, "rotary_dim 16 exceeds head_dim 8"),
        ({"model_type": "mistral"}, "names LlamaForCausalLM, but model_type 'mistral' is that of MistralForCausalLM"),
        ({"lamella_checkpoint": 1}, "Lamella checkpoint; load it with from_checkpoint"),
        (_MISTRAL | {"sliding_window": 0}, "sliding_window is 0; it must be an integer"),
        (_MIXTRAL | {"num_local_experts": "4"}, "num_local_experts is '4'; it must be an integer"),
        (_QWEN2 | {"layer_types": [["full_attention"], 2]}, "layer_types is .* it needs full_attention or"),
        (_QWEN2 | {"layer_types": 5}, "layer_types is 5"),
        (_QWEN2 | {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers is '1'"),
    ],
)  # fmt: skip
def test_bad_config(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_hugging_face(write_config(tmp_path, **keys))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"norm_eps": "x"}, "norm_eps is 'x'; it must be a finite number"),
        ({"rope": {"theta": 3.0}}, "rope is .*; it must be a RopeConfig"),
        ({"quantization": 3}, "quantization is 3; it must be a QuantConfig"),
        ({"eos_token_ids": 3}, "eos_token_ids is 3; it must be a list"),
        ({"head_dim": "8"}, "head_dim is '8'; it must be an integer"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_hugging_face(write_config(tmp_path), **override)


def test_a_list_becomes_the_tuple_of_the_field(tmp_path):
    config = AutoConfig.from_hugging_face(write_config(tmp_path), eos_token_ids=[3, 4])
    assert config.eos_token_ids == (3, 4) and type(config).from_dict(config.to_dict()) == config


def test_tokens_that_do_not_exist_are_left_out(tmp_path):
    config = AutoConfig.from_hugging_face(
        write_config(tmp_path, pad_token_id=-1, bos_token_id=-1, eos_token_id=[-1, 2])
    )
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (2,), None)


def test_a_derived_model_type_is_that_of_the_class(tmp_path):
    config = AutoConfig.from_hugging_face(write_config(tmp_path, model_type="my_llama"))
    assert (config.architecture, config.model_type) == ("LlamaForCausalLM", "llama")


def test_a_model_refuses_another_models_configuration(tmp_path):
    config = AutoConfig.from_hugging_face(write_config(tmp_path))
    for other in (config, vars(config)):
        with pytest.raises(ConfigError, match="Qwen2ForCausalLM is made from a Qwen2Config"):
            Qwen2ForCausalLM(other)


def test_unsupported_architecture_lists_the_supported(tmp_path):
    write_config(tmp_path, architectures=["LlamaForCausalML"], model_type="nope")
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel, .*did you mean 'LlamaForCausalLM'"):
        AutoConfig.from_hugging_face(tmp_path)
    with pytest.raises(UnsupportedModelError):
        AutoModelForCausalLM.get_model_class(tmp_path)


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("Gemma3nForConditionalGeneration", "Gemma3ForConditionalGeneration"),
        ("Mistral3ForConditionalGeneration", "MistralForCausalLM"),
        ("InternLM2ForRewardModel", "InternLM2ForCausalLM"),
        ("LLaMAForCausalLM", "LlamaForCausalLM"),
        ("DistilBertForSequenceClassification", "BertForSequenceClassification"),
        ("Qwen3VLMoeForConditionalGeneration", "Qwen3MoeForCausalLM"),
        ("T5ForConditionalGeneration", None),
    ],
)
def test_the_nearest_architecture_is_of_the_nearest_family(tmp_path, given, near):
    with pytest.raises(UnsupportedModelError) as caught:
        AutoConfig.from_hugging_face(write_config(tmp_path, architectures=[given], model_type="nope"))
    assert str(caught.value).endswith(f"did you mean {near!r}?") if near else "did you mean" not in str(caught.value)


def test_model_type_is_no_path(tmp_path):
    write_config(tmp_path, architectures=["X"], model_type="../../etc/passwd")
    with pytest.raises(UnsupportedModelError):
        AutoConfig.from_hugging_face(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\udc80", "null"])
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="config.json"):
        AutoConfig.from_hugging_face(tmp_path)


def test_missing_directory_and_file(tmp_path):
    with pytest.raises(CheckpointError, match="not a Hugging Face model directory"):
        AutoConfig.from_hugging_face(tmp_path)
    with pytest.raises(CheckpointError, match="no directory"):
        AutoConfig.from_hugging_face(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model_dir(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="no directory ''"):
        resolve_model_dir("")


def test_hub_id_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="pass a local directory"):
        AutoConfig.from_hugging_face("nobody/no-such-model")


def test_a_hub_that_never_answers_holds_nobody_up(monkeypatch, tmp_path):
    release = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: release.wait(60))
    monkeypatch.setattr("lamella_core.hub._ANSWER_SECONDS", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    try:
        with pytest.raises(CheckpointError, match="'models/my-lama' here.*no answer.*pass a local directory"):
            resolve_model_dir("models/my-lama")
    finally:
        release.set()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "no such model"),
        ("GatedRepoError", "accepted its terms"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalTokenNotFoundError", "cannot be reached .LocalTokenNotFoundError: because"),
    ],
)
def test_what_the_hub_answers_is_said(monkeypatch, tmp_path, kind, message):
    error_class = getattr(huggingface_hub.errors, kind)

    def refuse(*_, **__):
        error = error_class.__new__(error_class)
        error.args = ("because",)
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        resolve_model_dir("org/name", "v9")


def test_names_that_no_file_can_have():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match="no directory"):
            resolve_model_dir(name)


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
def test_hub_downloads_bin_only_without_safetensors(monkeypatch, tmp_path, stored):
    asked = []

    def snapshot_download(hub_id, revision, allow_patterns, ignore_patterns, local_files_only):
        assert not local_files_only
        asked.append((hub_id, revision, allow_patterns[-1]))
        if stored.endswith(allow_patterns[-1].lstrip("*")):
            (tmp_path / stored).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model_dir("org/name", "v1") == tmp_path
    kinds = ["*.jinja", "*.safetensors"] + (["*.bin"] if stored.endswith(".bin") else [])
    assert asked == [("org/name", "v1", kind) for kind in kinds]
    assert resolve_model_dir("org/name", weights=False) == tmp_path
    assert asked[-1] == ("org/name", None, "*.jinja")


def test_overrides(tmp_path):
    write_config(tmp_path)
    config = AutoConfig.from_hugging_face(
        tmp_path, dtype="bfloat16", num_hidden_layers=1, rope_theta=7.0, rms_norm_eps=0.5, sliding_window=3
    )
    assert (config.num_hidden_layers, config.rope.theta, config.dtype) == (1, 7.0, "bfloat16")
    assert (config.norm_eps, config.sliding_window) == (0.5, 3)
    for name, near in (("num_hidden_layer", "num_hidden_layers"), ("head_dims", "head_dim")):
        with pytest.raises(ConfigError, match=f"no configuration field '{name}'; did you mean '{near}'"):
            AutoConfig.from_hugging_face(tmp_path, **{name: 1})
    with pytest.raises(ConfigError, match="num_hidden_layers is 'two'"):
        AutoConfig.from_hugging_face(tmp_path, num_hidden_layers="two")


def test_overrides_reach_keys_under_either_name():
    directory = hf_dir("GPT2LMHeadModel", "tied")
    assert AutoConfig.from_hugging_face(directory, num_hidden_layers=1).num_hidden_layers == 1
    assert AutoConfig.from_hugging_face(directory, n_layer=1).num_hidden_layers == 1


def test_generation_config_says_what_ends_a_text(tmp_path):
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert AutoConfig.from_hugging_face(tmp_path).eos_token_ids == (7, 9)
    assert AutoConfig.from_hugging_face(tmp_path, eos_token_id=4).eos_token_ids == (4,)


def test_qwen_windows(tmp_path):
    write_config(
        tmp_path, architectures=["Qwen2ForCausalLM"], model_type="qwen2", sliding_window=9, max_window_layers=1
    )
    assert AutoConfig.from_hugging_face(tmp_path).sliding_window is None
    config = AutoConfig.from_hugging_face(tmp_path, use_sliding_window=True)
    model = Qwen2ForCausalLM.empty(config)
    assert [spec.sliding_window for spec in model.attention_specs()] == [None, 9]
    with pytest.raises(ConfigError, match="layer_types is"):
        AutoConfig.from_hugging_face(tmp_path, layer_types=["full_attention"])
    with pytest.raises(ConfigError, match="use_sliding_window is off"):
        AutoConfig.from_hugging_face(tmp_path, layer_types=["full_attention", "sliding_attention"])


def test_mapping_that_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="tp_size 3 does not divide num_attention_heads 4"):
        AutoConfig.from_hugging_face(write_config(tmp_path), mapping=Mapping(world_size=3, tp_size=3))


def test_model_class_and_aliases():
    directory = hf_dir("GPT2LMHeadModel", "tied")
    assert AutoModelForCausalLM.get_model_class(directory) is GPT2LMHeadModel
    assert AutoModelForCausalLM.get_trtllm_model_class(directory) is GPT2LMHeadModel
    assert lamella_core.LLaMAForCausalLM is LlamaForCausalLM
    assert lamella_core.QWenForCausalLM is Qwen2ForCausalLM
    assert lamella_core.GPTForCausalLM is GPT2LMHeadModel


def test_model_of_another_class():
    with pytest.raises(UnsupportedModelError, match="holds GPT2LMHeadModel; LlamaForCausalLM loads LlamaForCausalLM"):
        LlamaForCausalLM.from_hugging_face(hf_dir("GPT2LMHeadModel", "tied"))


def test_dummy_needs_no_weights(tmp_path):
    model = AutoModelForCausalLM.from_hugging_face(write_config(tmp_path), load_format="dummy", dtype="bfloat16")
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.weight_bytes() == 2 * model.num_parameters() == 2 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigError, match="load_format is 'fast'"):
        AutoModelForCausalLM.from_hugging_face(tmp_path, load_format="fast")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_checkpoint_round_trip(tmp_path, architecture):
    variant = {"LlamaForCausalLM": "biased_tied", "MixtralForCausalLM": "top2"}[architecture]
    model = AutoModelForCausalLM.from_hugging_face(hf_dir(architecture, variant))
    model.save_checkpoint(tmp_path / "checkpoint")
    again = AutoModelForCausalLM.from_checkpoint(tmp_path / "checkpoint")
    assert type(again) is type(model) and again.config == model.config
    assert AutoModelForCausalLM.get_model_class(tmp_path / "checkpoint") is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_every_public_name_resolves():
    for name in lamella_core.__all__:
        assert getattr(lamella_core, name).__name__
    assert set(lamella_core.__all__) <= set(dir(lamella_core))
    with pytest.raises(AttributeError, match="no attribute 'AutoModel'"):
        _ = lamella_core.AutoModel


def test_import_loads_no_torch():
    code = "import lamella_core, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
