"""ChatGLM2, ChatGLM3 and GLM-4, from the published configurations and tensor names (chatglm3-6b, glm-4-9b)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tests.references.base import Reference, Shapes, attended, rms, silu
from torch import Tensor


def _half_turned(x: Tensor, base: float) -> Tensor:
    """Neighbours in the first half of each head of x [T, heads, D] as complex numbers, turned by their place."""
    tokens, _, size = x.shape
    head = torch.view_as_complex(x[..., : size // 2].reshape(*x.shape[:2], -1, 2).contiguous())
    speeds = torch.tensor([base ** (-2 * pair / (size // 2)) for pair in range(size // 4)]).double()
    angles = torch.arange(tokens).double()[:, None] * speeds
    head = head * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((torch.view_as_real(head).flatten(2), x[..., size // 2 :]), dim=-1)


class ChatGLM(Reference):
    """Queries, keys and values side by side in one matrix; the MLP's gate before what it gates."""

    architecture, model_type = "ChatGLMModel", "chatglm"

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, heads = c.hidden_size, c.num_attention_heads * c.kv_channels
        packed = heads + 2 * c.multi_query_group_num * c.kv_channels
        out: Shapes = {"transformer.embedding.word_embeddings.weight": (c.padded_vocab_size, hidden)}
        out["transformer.rotary_pos_emb.inv_freq"] = (c.kv_channels // 4,)
        for i in range(c.num_layers):
            layer = f"transformer.encoder.layers.{i}"
            out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            for name, shape, biased in (
                ("self_attention.query_key_value", (packed, hidden), c.add_qkv_bias or c.add_bias_linear),
                ("self_attention.dense", (hidden, heads), c.add_bias_linear),
                ("mlp.dense_h_to_4h", (2 * c.ffn_hidden_size, hidden), c.add_bias_linear),
                ("mlp.dense_4h_to_h", (hidden, c.ffn_hidden_size), c.add_bias_linear),
            ):
                out[f"{layer}.{name}.weight"] = shape
                if biased:
                    out[f"{layer}.{name}.bias"] = shape[:1]
        out["transformer.encoder.final_layernorm.weight"] = (hidden,)
        return {**out, "transformer.output_layer.weight": (c.padded_vocab_size, hidden)}

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        base, size, groups = 10000 * getattr(c, "rope_ratio", 1), c.kv_channels, c.multi_query_group_num

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

        x = w["transformer.embedding.word_embeddings.weight"][ids]
        for i in range(c.num_layers):
            layer = f"transformer.encoder.layers.{i}"
            y = rms(x, w[f"{layer}.input_layernorm.weight"], c.layernorm_epsilon)
            packed = linear(y, f"{layer}.self_attention.query_key_value").view(len(ids), -1, size)
            q, k, v = packed.split([c.num_attention_heads, groups, groups], dim=1)
            y = attended(_half_turned(q, base), _half_turned(k, base), v)
            x = x + linear(y, f"{layer}.self_attention.dense")
            y = rms(x, w[f"{layer}.post_attention_layernorm.weight"], c.layernorm_epsilon)
            gate, up = linear(y, f"{layer}.mlp.dense_h_to_4h").chunk(2, dim=1)
            x = x + linear(silu(gate) * up, f"{layer}.mlp.dense_4h_to_h")
        x = rms(x, w["transformer.encoder.final_layernorm.weight"], c.layernorm_epsilon)
        return x @ w["transformer.output_layer.weight"].T


class ChatGLMConditional(ChatGLM):
    """The same under the name of the chat models."""

    architecture = "ChatGLMForConditionalGeneration"
