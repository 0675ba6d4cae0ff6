"""InternLM 1, 2 and 3, from the published configurations and tensor names (internlm-7b, internlm2-7b, internlm3-8b)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tests.references.base import Reference, Shapes, attended, ntk_angles, rms, silu, turned
from torch import Tensor


class InternLM(Reference):
    """Llama of equal head counts whose four attention projections may have biases."""

    architecture, model_type = "InternLMForCausalLM", "internlm"

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, inner = c.hidden_size, c.intermediate_size
        out: Shapes = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            for part in "qkvo":
                out[f"{layer}.self_attn.{part}_proj.weight"] = (hidden, hidden)
                if c.bias:
                    out[f"{layer}.self_attn.{part}_proj.bias"] = (hidden,)
            out[f"{layer}.self_attn.rotary_emb.inv_freq"] = (hidden // c.num_attention_heads // 2,)
            out[f"{layer}.mlp.gate_proj.weight"] = out[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
            out[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
            out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        return {**out, "model.norm.weight": (hidden,), "lm_head.weight": (c.vocab_size, hidden)}

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        tokens, heads = len(ids), c.num_attention_heads
        rotary = getattr(c, "rotary", {"type": "origin", "base": 10000})
        factor = rotary.get("scaling_factor", 1.0) if rotary["type"] == "dynamic" else None
        angles = ntk_angles(tokens, c.hidden_size // heads, rotary["base"], factor, c.max_position_embeddings)
        x = w["model.embed_tokens.weight"][ids]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            y = rms(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
            q, k, v = (_linear(y, w, f"{layer}.self_attn.{part}_proj").view(tokens, heads, -1) for part in "qkv")
            x = x + _linear(attended(turned(q, angles), turned(k, angles), v), w, f"{layer}.self_attn.o_proj")
            y = rms(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
            gate, up = y @ w[f"{layer}.mlp.gate_proj.weight"].T, y @ w[f"{layer}.mlp.up_proj.weight"].T
            x = x + (silu(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
        return rms(x, w["model.norm.weight"], c.rms_norm_eps) @ w["lm_head.weight"].T


class InternLM2(Reference):
    """Grouped-query Llama; ``wqkv`` holds, for every key/value head, its queries, its key and its value."""

    architecture, model_type = "InternLM2ForCausalLM", "internlm2"

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, inner, size = c.hidden_size, c.intermediate_size, c.hidden_size // c.num_attention_heads
        packed = (c.num_attention_heads + 2 * c.num_key_value_heads) * size
        out: Shapes = {"model.tok_embeddings.weight": (c.vocab_size, hidden)}
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            out[f"{layer}.attention.wqkv.weight"] = (packed, hidden)
            out[f"{layer}.attention.wo.weight"] = (hidden, hidden)
            if c.bias:
                out[f"{layer}.attention.wqkv.bias"], out[f"{layer}.attention.wo.bias"] = (packed,), (hidden,)
            out[f"{layer}.feed_forward.w1.weight"] = out[f"{layer}.feed_forward.w3.weight"] = (inner, hidden)
            out[f"{layer}.feed_forward.w2.weight"] = (hidden, inner)
            out[f"{layer}.attention_norm.weight"] = out[f"{layer}.ffn_norm.weight"] = (hidden,)
        return {**out, "model.norm.weight": (hidden,), "output.weight": (c.vocab_size, hidden)}

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        tokens, size = len(ids), c.hidden_size // c.num_attention_heads
        queries = c.num_attention_heads // c.num_key_value_heads
        factor = c.rope_scaling["factor"] if c.rope_scaling else None
        angles = ntk_angles(tokens, size, c.rope_theta, factor, c.max_position_embeddings)
        x = w["model.tok_embeddings.weight"][ids]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            y = rms(x, w[f"{layer}.attention_norm.weight"], c.rms_norm_eps)
            packed = _linear(y, w, f"{layer}.attention.wqkv").view(tokens, c.num_key_value_heads, queries + 2, size)
            q, k, v = packed[:, :, :queries].reshape(tokens, -1, size), packed[:, :, -2], packed[:, :, -1]
            x = x + _linear(attended(turned(q, angles), turned(k, angles), v), w, f"{layer}.attention.wo")
            y = rms(x, w[f"{layer}.ffn_norm.weight"], c.rms_norm_eps)
            gate, up = (y @ w[f"{layer}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
            x = x + (silu(gate) * up) @ w[f"{layer}.feed_forward.w2.weight"].T
        return rms(x, w["model.norm.weight"], c.rms_norm_eps) @ w["output.weight"].T


class InternLM3(Reference):
    """Grouped-query Llama of a given head size; one bias switch for q, k and v, another for all other projections."""

    architecture, model_type = "InternLM3ForCausalLM", "internlm3"

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, inner = c.hidden_size, c.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        out: Shapes = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            for name, rows, columns, bias in (
                ("self_attn.q_proj", q, hidden, c.qkv_bias),
                ("self_attn.k_proj", kv, hidden, c.qkv_bias),
                ("self_attn.v_proj", kv, hidden, c.qkv_bias),
                ("self_attn.o_proj", hidden, q, c.bias),
                ("mlp.gate_proj", inner, hidden, c.bias),
                ("mlp.up_proj", inner, hidden, c.bias),
                ("mlp.down_proj", hidden, inner, c.bias),
            ):
                out[f"{layer}.{name}.weight"] = (rows, columns)
                if bias:
                    out[f"{layer}.{name}.bias"] = (rows,)
            out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        return {**out, "model.norm.weight": (hidden,), "lm_head.weight": (c.vocab_size, hidden)}

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        factor = c.rope_scaling["factor"] if c.rope_scaling else None
        angles = ntk_angles(len(ids), c.head_dim, c.rope_theta, factor, c.max_position_embeddings)
        x = w["model.embed_tokens.weight"][ids]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            y = rms(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
            q, k, v = (_linear(y, w, f"{layer}.self_attn.{p}_proj").view(len(ids), -1, c.head_dim) for p in "qkv")
            x = x + _linear(attended(turned(q, angles), turned(k, angles), v), w, f"{layer}.self_attn.o_proj")
            y = rms(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
            gate, up = _linear(y, w, f"{layer}.mlp.gate_proj"), _linear(y, w, f"{layer}.mlp.up_proj")
            x = x + _linear(silu(gate) * up, w, f"{layer}.mlp.down_proj")
        return rms(x, w["model.norm.weight"], c.rms_norm_eps) @ w["lm_head.weight"].T


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))
