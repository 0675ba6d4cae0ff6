"""MPT as MosaicML published it: grouped keys and values, norms of queries and keys, clipping, steeper or flatter ALiBi.

Written from the description of its options in the model card and configuration; weights are called as in its files.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from tests.references.base import Reference, Shapes, attended
from torch import Tensor

_PREFIX = "transformer."
_EPS = 1e-5


class MPT(Reference):
    """The output layer is the embedding."""

    architecture = "MPTForCausalLM"
    model_type = "mpt"

    @staticmethod
    def config_class(**values: Any) -> SimpleNamespace:
        return SimpleNamespace(**{"expansion_ratio": 4, "tie_word_embeddings": True, "no_bias": True, **values})

    @property
    def base_model(self) -> SimpleNamespace:
        bare = {name.removeprefix(_PREFIX): tensor for name, tensor in self.weights.items()}
        return SimpleNamespace(state_dict=lambda: bare)

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, keys = c.d_model, _kv_heads(c) * (c.d_model // c.n_heads)
        found: Shapes = {"transformer.wte.weight": (c.vocab_size, hidden), "transformer.norm_f.weight": (hidden,)}
        for layer in range(c.n_layers):
            block = f"transformer.blocks.{layer}."
            found |= {
                f"{block}norm_1.weight": (hidden,),
                f"{block}norm_2.weight": (hidden,),
                f"{block}attn.Wqkv.weight": (hidden + 2 * keys, hidden),
                f"{block}attn.out_proj.weight": (hidden, hidden),
                f"{block}ffn.up_proj.weight": (c.expansion_ratio * hidden, hidden),
                f"{block}ffn.down_proj.weight": (hidden, c.expansion_ratio * hidden),
            }
            if c.attn_config.get("qk_ln"):
                found |= {f"{block}attn.q_ln.weight": (hidden,), f"{block}attn.k_ln.weight": (keys,)}
        return found

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        options, heads, kv_heads = c.attn_config, c.n_heads, _kv_heads(c)
        size = c.d_model // heads
        slopes = _slopes(heads, options.get("alibi_bias_max", 8))
        x = w["transformer.wte.weight"][ids]
        for layer in range(c.n_layers):
            block = f"transformer.blocks.{layer}."
            fused = _normed(x, w[f"{block}norm_1.weight"]) @ w[f"{block}attn.Wqkv.weight"].T
            if options.get("clip_qkv"):
                fused = torch.minimum(torch.maximum(fused, -_like(options["clip_qkv"])), _like(options["clip_qkv"]))
            q, k, v = torch.tensor_split(fused, (heads * size, (heads + kv_heads) * size), dim=1)
            if options.get("qk_ln"):
                q, k = _normed(q, w[f"{block}attn.q_ln.weight"]), _normed(k, w[f"{block}attn.k_ln.weight"])
            seen = attended(*(part.unflatten(1, (-1, size)) for part in (q, k, v)), slopes)
            x = x + seen @ w[f"{block}attn.out_proj.weight"].T
            inner = _normed(x, w[f"{block}norm_2.weight"]) @ w[f"{block}ffn.up_proj.weight"].T
            x = x + inner * torch.special.ndtr(inner) @ w[f"{block}ffn.down_proj.weight"].T
        return _normed(x, w["transformer.norm_f.weight"]) @ w["transformer.wte.weight"].T


def _kv_heads(c: SimpleNamespace) -> int:
    kind = c.attn_config.get("attn_type", "multihead_attention")
    return {"multiquery_attention": 1, "grouped_query_attention": c.attn_config.get("kv_n_heads")}.get(kind, c.n_heads)


def _like(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    """Every row to mean 0 and variance 1, times the weight."""
    x = x - x.mean(dim=1, keepdim=True)
    return weight * x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + _EPS)


def _slopes(heads: int, bias_max: float) -> Tensor:
    """A geometric row for the power of two from ``heads`` up; where that is more, its odd places first, cut off."""
    count = 2 ** math.ceil(math.log2(heads))
    row = [2.0 ** (-bias_max * place / count) for place in range(1, count + 1)]
    row = row if count == heads else row[1::2] + row[::2]
    return torch.tensor(row[:heads], dtype=torch.float64)
