"""Qwen-1, from the published configuration and tensor names (Qwen-7B).

Its attention multiplies queries beyond the trained length by logarithms and turns with a base that grows in steps; the
step of a token is that of the text that ends with it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from tests.references.base import Reference, Shapes, attended, rms, silu, turned
from torch import Tensor


class QWen(Reference):
    """Llama of equal head counts; w1 is multiplied by the activated w2."""

    architecture, model_type = "QWenLMHeadModel", "qwen"

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, inner, heads = c.hidden_size, c.intermediate_size // 2, c.num_attention_heads * c.kv_channels
        out: Shapes = {"transformer.wte.weight": (c.vocab_size, hidden)}
        for i in range(c.num_hidden_layers):
            layer = f"transformer.h.{i}"
            out[f"{layer}.ln_1.weight"] = out[f"{layer}.ln_2.weight"] = (hidden,)
            out[f"{layer}.attn.c_attn.weight"], out[f"{layer}.attn.c_attn.bias"] = (3 * heads, hidden), (3 * heads,)
            for name, shape in (
                ("attn.c_proj", (hidden, heads)),
                ("mlp.w1", (inner, hidden)),
                ("mlp.w2", (inner, hidden)),
                ("mlp.c_proj", (hidden, inner)),
            ):
                out[f"{layer}.{name}.weight"] = shape
                if not c.no_bias:
                    out[f"{layer}.{name}.bias"] = shape[:1]
        return {**out, "transformer.ln_f.weight": (hidden,), "lm_head.weight": (c.vocab_size, hidden)}

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        tokens, size = len(ids), c.kv_channels
        angles, sharpness = torch.zeros(tokens, size // 2).double(), torch.ones(tokens, 1, 1).double()
        for place in range(tokens):
            base, length = c.rotary_emb_base, place + 1
            if c.use_dynamic_ntk:
                alpha = max(1, 2 ** math.ceil(math.log2(length / c.seq_length) + 1) - 1)
                base = base * alpha ** (size / (size - 2))
            angles[place] = place * torch.tensor([base ** (-2 * pair / size) for pair in range(size // 2)]).double()
            if c.use_logn_attn and length > c.seq_length:
                sharpness[place] = math.log(length, c.seq_length)

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

        x = w["transformer.wte.weight"][ids]
        for i in range(c.num_hidden_layers):
            layer = f"transformer.h.{i}"
            y = linear(rms(x, w[f"{layer}.ln_1.weight"], c.layer_norm_epsilon), f"{layer}.attn.c_attn")
            q, k, v = (part.view(tokens, -1, size) for part in y.chunk(3, dim=1))
            y = attended(turned(q, angles) * sharpness, turned(k, angles), v)
            x = x + linear(y, f"{layer}.attn.c_proj")
            y = rms(x, w[f"{layer}.ln_2.weight"], c.layer_norm_epsilon)
            x = x + linear(linear(y, f"{layer}.mlp.w1") * silu(linear(y, f"{layer}.mlp.w2")), f"{layer}.mlp.c_proj")
        return rms(x, w["transformer.ln_f.weight"], c.layer_norm_epsilon) @ w["lm_head.weight"].T
