"""DeciLM: Llama of unequal layers, from the published configurations and tensor names (DeciLM-7B, Nemotron-NAS)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.references.base import Reference, Shapes, attended, ntk_angles, rms, silu, turned
from torch import Tensor


def _inner(c: SimpleNamespace, multiple: float) -> int:
    size = int(2 * multiple * c.hidden_size / 3)
    while size % 256:
        size += 1
    return size


class DeciLM(Reference):
    """A layer is grouped attention, a matrix or nothing, then a gated MLP, a matrix or nothing."""

    architecture, model_type = "DeciLMForCausalLM", "nemotron-nas"

    @staticmethod
    def block(c: SimpleNamespace, i: int) -> tuple[str | int, str | int]:
        """Returns (key/value heads, "matrix" or "none") and (inner size, "matrix" or "none") of layer i."""
        if not hasattr(c, "block_configs"):
            return c.num_key_value_heads_per_layer[i], c.intermediate_size
        given: dict[str, Any] = c.block_configs[i]
        out: list[str | int] = []
        for name in ("attention", "ffn"):
            part = given[name]
            if part.get("no_op"):
                out.append("none")
            elif part.get("replace_with_linear"):
                out.append("matrix")
            elif name == "attention":
                out.append(c.num_attention_heads // part["n_heads_in_group"])
            else:
                out.append(_inner(c, part["ffn_mult"]))
        return out[0], out[1]

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, size = c.hidden_size, c.hidden_size // c.num_attention_heads
        out: Shapes = {"model.embed_tokens.weight": (c.vocab_size, hidden), "model.norm.weight": (hidden,)}
        out["lm_head.weight"] = (c.vocab_size, hidden)
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            heads, inner = self.block(c, i)
            if heads != "none":
                out[f"{layer}.input_layernorm.weight"] = (hidden,)
            if heads == "matrix":
                out[f"{layer}.self_attn.linear_attn.weight"] = (hidden, hidden)
            elif isinstance(heads, int):
                out[f"{layer}.self_attn.q_proj.weight"] = out[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
                out[f"{layer}.self_attn.k_proj.weight"] = (heads * size, hidden)
                out[f"{layer}.self_attn.v_proj.weight"] = (heads * size, hidden)
            if inner != "none":
                out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            if inner == "matrix":
                out[f"{layer}.mlp.linear_mlp.weight"] = (hidden, hidden)
            elif isinstance(inner, int):
                out[f"{layer}.mlp.gate_proj.weight"] = out[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
                out[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        return out

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        tokens, size = len(ids), c.hidden_size // c.num_attention_heads
        angles = ntk_angles(tokens, size, c.rope_theta, None, c.max_position_embeddings)
        x = w["model.embed_tokens.weight"][ids]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            heads, inner = self.block(c, i)
            if heads != "none":
                y = rms(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
                if heads == "matrix":
                    x = x + y @ w[f"{layer}.self_attn.linear_attn.weight"].T
                else:
                    q, k, v = ((y @ w[f"{layer}.self_attn.{p}_proj.weight"].T).view(tokens, -1, size) for p in "qkv")
                    y = attended(turned(q, angles), turned(k, angles), v)
                    x = x + y @ w[f"{layer}.self_attn.o_proj.weight"].T
            if inner != "none":
                y = rms(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
                if inner == "matrix":
                    x = x + y @ w[f"{layer}.mlp.linear_mlp.weight"].T
                else:
                    gate, up = y @ w[f"{layer}.mlp.gate_proj.weight"].T, y @ w[f"{layer}.mlp.up_proj.weight"].T
                    x = x + (silu(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
        return rms(x, w["model.norm.weight"], c.rms_norm_eps) @ w["lm_head.weight"].T
