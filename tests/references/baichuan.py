"""Baichuan 1 and 2, from the published configurations and tensor names: 7B turns queries and keys, 13B has ALiBi.

Files of 13B models give model_max_length and no max_position_embeddings; those of version 2 have z_loss_weight.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tests.references.base import Reference, Shapes, attended, ntk_angles, rms, silu, turned
from torch import Tensor


class Baichuan(Reference):
    """Llama of equal head counts with one matrix for q, k and v; version 2 scores by cosine, up to the state's norm."""

    architecture, model_type = "BaichuanForCausalLM", "baichuan"

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, inner = c.hidden_size, c.intermediate_size
        out: Shapes = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            out[f"{layer}.self_attn.W_pack.weight"] = (3 * hidden, hidden)
            out[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
            out[f"{layer}.mlp.gate_proj.weight"] = out[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
            out[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
            out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        return {**out, "model.norm.weight": (hidden,), "lm_head.weight": (c.vocab_size, hidden)}

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        tokens, heads = len(ids), c.num_attention_heads
        angles, slopes = None, None
        if hasattr(c, "max_position_embeddings"):
            angles = ntk_angles(tokens, c.hidden_size // heads, 10000.0, None, 0)
        else:
            slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
        x = w["model.embed_tokens.weight"][ids]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            y = rms(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
            q, k, v = (y @ part.T for part in w[f"{layer}.self_attn.W_pack.weight"].chunk(3))
            q, k, v = (part.view(tokens, heads, -1) for part in (q, k, v))
            if angles is not None:
                q, k = turned(q, angles), turned(k, angles)
            x = x + attended(q, k, v, slopes) @ w[f"{layer}.self_attn.o_proj.weight"].T
            y = rms(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
            gate, up = y @ w[f"{layer}.mlp.gate_proj.weight"].T, y @ w[f"{layer}.mlp.up_proj.weight"].T
            x = x + (silu(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
        head = w["lm_head.weight"]
        if hasattr(c, "z_loss_weight"):
            head = head / (head * head).sum(dim=1, keepdim=True).sqrt()
        return rms(x, w["model.norm.weight"], c.rms_norm_eps) @ head.T


class Baichuan7B(Baichuan):
    """The name that the first 7B model has for itself."""

    architecture = "BaiChuanForCausalLM"


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 k / n) for the largest power of two n of heads, then every other slope of twice as many (Press 2022)."""
    power = 1
    while power * 2 <= heads:
        power *= 2
    first = [2.0 ** (-8.0 * (k + 1) / power) for k in range(power)]
    between = [2.0 ** (-4.0 * (2 * k + 1) / power) for k in range(heads - power)]
    return first + between
