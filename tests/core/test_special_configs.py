"""Published configurations of GLM's first versions and Phi-3-small, and values that are refused."""

import json

import pytest
import torch
from tests.support.tiny_models import hf_dir

from lamella_core import AutoConfig, AutoModelForCausalLM
from lamella_core.context import SingleRank
from lamella_core.engine import BuildConfig, Engine
from lamella_core.errors import ConfigError
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_core.mapping import Mapping
from lamella_core.models.chatglm import ChatGLMModel
from lamella_core.models.chatglm1 import ChatGLM1Model
from lamella_core.prefix import PrefixRule

CHATGLM_6B = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "bos_token_id": 130004, "eos_token_id": 130005,
    "gmask_token_id": 130001, "mask_token_id": 130000, "pad_token_id": 3, "hidden_size": 4096,
    "inner_hidden_size": 16384, "layernorm_epsilon": 1e-05, "max_sequence_length": 2048, "num_attention_heads": 32,
    "num_layers": 28, "position_encoding_2d": True, "pre_seq_len": None, "prefix_projection": False,
    "quantization_bit": 0, "torch_dtype": "float16", "use_cache": True, "vocab_size": 130528,
}  # fmt: skip
GLM_10B = {
    "architectures": ["GLMModel"], "model_type": "glm", "attention_scale": 1.0, "block_position_encoding": True,
    "checkpoint_activations": False, "hidden_size": 4096, "max_sequence_length": 1024, "num_attention_heads": 64,
    "num_layers": 48, "output_predict": True, "parallel_output": True, "pool_token": "cls", "relative_encoding": False,
    "spell_func": "lstm", "spell_length": None, "torch_dtype": "float16", "vocab_size": 50304,
}  # fmt: skip
PHI_3_SMALL = {
    "architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small", "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False, "blocksparse_num_local_blocks": 16, "blocksparse_vert_stride": 8,
    "blocksparse_triton_kernel_block_size": 64, "bos_token_id": 100257, "dense_attention_every_n_layers": 2,
    "eos_token_id": 100257, "ff_dim_multiplier": None, "ff_intermediate_size": 14336, "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True, "hidden_act": "gegelu", "hidden_size": 4096, "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192, "mup_attn_multiplier": 1.0, "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True, "mup_width_multiplier": 8.0, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pad_sequence_to_multiple_of_64": True, "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0, "rope_scaling": None, "torch_dtype": "bfloat16", "vocab_size": 100352,
}  # fmt: skip


def read(tmp_path, config, **changes):
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return AutoConfig.from_hugging_face(tmp_path)


def test_chatglm_6b(tmp_path):
    """Told from its successors, which have its name, by a key of its file."""
    config = read(tmp_path, CHATGLM_6B)
    assert AutoModelForCausalLM.get_model_class(tmp_path) is ChatGLM1Model
    assert config.prefix_rule == PrefixRule(130004, ((130001,), (130000,)))
    assert (config.head_dim, config.rope.rotary_dim, config.intermediate_size) == (128, 64, 16384)
    assert (config.dtype, config.eos_token_ids, config.tie_word_embeddings) == ("float16", (130005,), True)
    later = hf_dir("ChatGLMModel", "grouped")
    assert AutoModelForCausalLM.get_model_class(later) is ChatGLMModel
    assert AutoConfig.from_hugging_face(later).prefix_rule is None


def test_glm_10b(tmp_path):
    config = read(tmp_path, GLM_10B)
    assert config.prefix_rule == PrefixRule(50257, ((50260, 50263, 50264),))
    assert (config.eos_token_ids, config.head_dim, config.intermediate_size) == ((50258,), 64, 16384)
    chinese = read(tmp_path, GLM_10B, vocab_size=50048)
    assert chinese.prefix_rule == PrefixRule(50006, ((50003, 50008, 50009),)) and chinese.eos_token_ids == (50007,)
    with pytest.raises(ConfigError, match="lacks 'sop_token_id'"):
        read(tmp_path, GLM_10B, vocab_size=30592)


def test_phi_3_small(tmp_path):
    config = read(tmp_path, PHI_3_SMALL)
    assert [config.sparsity(i) for i in range(3)] == [BlockSparsity(64, 16, 8, 1), None, BlockSparsity(64, 16, 8, 1)]
    assert (config.attention_scale, config.embedding_scale, config.logit_scale) == (1 / 128, 10.0, 0.125)
    assert config.rope.theta == 1e6 and config.intermediate_size == 14336
    kept = set(range(100352)) - set(config.dummy_token_ids)
    assert kept == {*range(100256), 100257, 100261, 100262, 100263, 100266}
    sized = read(tmp_path, PHI_3_SMALL, ff_dim_multiplier=2, ff_intermediate_size=None)
    assert sized.intermediate_size == 5632  # 2 * 1365 * 2 in whole 256s


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CHATGLM_6B, {"quantization_bit": 4}, "quantization_bit is 4"),
        (CHATGLM_6B, {"pre_seq_len": 128}, "pre_seq_len is 128"),
        (CHATGLM_6B, {"position_encoding_2d": False}, "position_encoding_2d is False"),
        (CHATGLM_6B, {"num_attention_heads": 2048}, "no multiple of 4"),
        (GLM_10B, {"block_position_encoding": False}, "block_position_encoding is False"),
        (PHI_3_SMALL, {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        (PHI_3_SMALL, {"mup_use_scaling": False}, "mup_use_scaling is False"),
        (PHI_3_SMALL, {"ff_dim_multiplier": 2}, "either ff_dim_multiplier or ff_intermediate_size"),
        (PHI_3_SMALL, {"blocksparse_block_size": 0}, "blocksparse_block_size"),
    ],
)
def test_what_is_refused(tmp_path, config, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, config, **changes)


def test_dummy_tokens_are_never_likely():
    directory = hf_dir("Phi3SmallForCausalLM", "sparse_first")
    plain, padded = (
        AutoModelForCausalLM.from_hugging_face(directory, dummy_token_indices=dummies) for dummies in ([], [3, 130])
    )
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    ctx = type("Alone", (), {"tp": SingleRank()})()
    expected = plain.compute_logits(hidden, ctx)
    expected[:, [3, 130]] = float("-inf")
    assert torch.equal(padded.compute_logits(hidden, ctx), expected)


def test_heads_of_other_ranks_see_their_own_columns():
    directory = hf_dir("Phi3SmallForCausalLM", "sparse_first")
    shards = [
        AutoModelForCausalLM.from_hugging_face(directory, mapping=Mapping(world_size=2, tp_size=2, rank=rank))
        for rank in (0, 1)
    ]
    assert [shard.attention_specs()[0].sparsity.first_head for shard in shards] == [0, 4]


def test_engines_keep_the_first_version_apart(tmp_path):
    model = AutoModelForCausalLM.from_hugging_face(hf_dir("ChatGLM1Model", "chat"))
    Engine.from_model(model, BuildConfig(max_batch_size=2)).save(tmp_path / "engine")
    again = Engine.load(tmp_path / "engine").model(0)
    assert type(again) is ChatGLM1Model and again.config == model.config
