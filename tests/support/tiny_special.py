"""Tiny configurations of GLM's first versions and Phi-3-small: see `tests.support.tiny_models`.

The tokens that mark blanks and answers are some of those in the prompts of the conformance suite (`_FIRST`, `_LAST`).
"""

from __future__ import annotations

from typing import Any

_FIRST = (50, 71, 28, 121, 70, 86, 26, 106, 95, 60, 17)
_LAST = (75, 92, 113, 45, 93, 11, 42, 105, 71, 51, 130, 10, 47, 3, 78, 58, 125)

_SIZES = {"vocab_size": 131, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "max_sequence_length": 64}
_CHATGLM1 = {**_SIZES, "inner_hidden_size": 48, "layernorm_epsilon": 1e-5, "position_encoding_2d": True,
             "eos_token_id": 2, "pad_token_id": 3}  # fmt: skip
_GLM10B = {**_SIZES, "block_position_encoding": True, "relative_encoding": False, "spell_length": None,
           "attention_scale": 1.0, "output_predict": True, "eop_token_id": 2}  # fmt: skip
_PHI3 = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_embedding_base": 1e6,
         "rope_position_scale": 1.0, "hidden_act": "gegelu", "gegelu_limit": 1.5, "ff_intermediate_size": 48,
         "ff_dim_multiplier": None,
         "blocksparse_homo_head_pattern": False, "blocksparse_block_size": 2, "blocksparse_num_local_blocks": 2,
         "blocksparse_vert_stride": 3, "dense_attention_every_n_layers": 2, "layer_norm_epsilon": 1e-5,
         "mup_use_scaling": True, "mup_width_multiplier": 1.0, "mup_embedding_multiplier": 1.5,
         "mup_attn_multiplier": 4.0, "bos_token_id": 2, "eos_token_id": 2}  # fmt: skip
_LONG = {"type": "su", "original_max_position_embeddings": 12, "short_factor": [1.0, 1.1, 1.2, 1.3],
         "long_factor": [1.0, 2.0, 3.0, 4.0], "short_mscale": 1.1, "long_mscale": 1.3}  # fmt: skip


def _answers(start: int, gmask: int, mask: int) -> dict[str, int]:
    return {"bos_token_id": start, "gmask_token_id": gmask, "mask_token_id": mask}


SPECIAL: dict[str, dict[str, dict[str, Any]]] = {
    "ChatGLM1Model": {
        "chat": {**_CHATGLM1, **_answers(_LAST[15], _LAST[14], _FIRST[5])},
        "blank_before_the_end": {**_CHATGLM1, **_answers(_FIRST[7], _FIRST[3], _FIRST[0]), "num_attention_heads": 2},
        "answer_from_the_start_untied": {**_CHATGLM1, **_answers(_LAST[0], _LAST[9], _FIRST[10]),
                                         "tie_word_embeddings": False, "num_attention_heads": 8},
    },
    "GLMModel": {
        "last_blank": {**_GLM10B, "sop_token_id": _LAST[16], "mask_token_ids": [_LAST[2], _LAST[11], 99]},
        "no_marks": {**_GLM10B, "sop_token_id": 129, "mask_token_ids": [128], "num_attention_heads": 2},
    },
    "GLMForConditionalGeneration": {
        "blank": {**_GLM10B, "sop_token_id": _FIRST[6], "mask_token_ids": [_FIRST[2], _LAST[4]], "hidden_size": 48},
    },
    "Phi3SmallForCausalLM": {
        "sparse_first": _PHI3,
        "alike_untied": {**_PHI3, "blocksparse_homo_head_pattern": True, "dense_attention_every_n_layers": None,
                         "blocksparse_num_local_blocks": 1, "blocksparse_block_size": 3, "tie_word_embeddings": False,
                         "num_key_value_heads": 8, "ff_intermediate_size": None, "ff_dim_multiplier": 2,
                         "gegelu_pad_to_256": False},
        "long_rope_far_heads": {**_PHI3, "rope_scaling": _LONG, "blocksparse_vert_stride": 16, "num_hidden_layers": 3,
                                "num_key_value_heads": 1, "blocksparse_block_size": 1},
    },
}  # fmt: skip
