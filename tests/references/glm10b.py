"""GLM-10B, from its published configuration and tensor names and from Du et al. 2022."""

from __future__ import annotations

from types import SimpleNamespace

from tests.references.base import Shapes
from tests.references.prefixed import PrefixedReference, attended_with_prefix, gelu, layer_norm
from torch import Tensor


class GLM10B(PrefixedReference):
    """Queries, keys and values one after the other in one matrix; two tables of positions; output tied."""

    architecture, model_type = "GLMModel", "glm"
    outer = ""  # before the tensors' names

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, rows = c.hidden_size, c.max_sequence_length + 1
        out: Shapes = {f"{self.outer}word_embeddings.weight": (c.vocab_size, hidden)}
        out[f"{self.outer}transformer.position_embeddings.weight"] = (rows, hidden)
        out[f"{self.outer}transformer.block_position_embeddings.weight"] = (rows, hidden)
        for i in range(c.num_layers):
            layer = f"{self.outer}transformer.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{layer}.{norm}.weight"] = out[f"{layer}.{norm}.bias"] = (hidden,)
            for name, shape in (
                ("attention.query_key_value", (3 * hidden, hidden)),
                ("attention.dense", (hidden, hidden)),
                ("mlp.dense_h_to_4h", (4 * hidden, hidden)),
                ("mlp.dense_4h_to_h", (hidden, 4 * hidden)),
            ):
                out[f"{layer}.{name}.weight"], out[f"{layer}.{name}.bias"] = shape, shape[:1]
        for leaf in ("weight", "bias"):
            out[f"{self.outer}transformer.final_layernorm.{leaf}"] = (hidden,)
        return out

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        w = {name.removeprefix(self.outer): tensor for name, tensor in w.items()}

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def normed(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        length, own, block = self.positions(ids, c.sop_token_id, [c.mask_token_ids])
        x = w["word_embeddings.weight"][ids] + w["transformer.position_embeddings.weight"][own]
        x = x + w["transformer.block_position_embeddings.weight"][block]
        for i in range(c.num_layers):
            layer = f"transformer.layers.{i}"
            packed = linear(normed(x, f"{layer}.input_layernorm"), f"{layer}.attention.query_key_value")
            q, k, v = (part.view(len(ids), c.num_attention_heads, -1) for part in packed.chunk(3, dim=1))
            x = x + linear(attended_with_prefix(q, k, v, length), f"{layer}.attention.dense")
            inner = gelu(linear(normed(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.dense_h_to_4h"))
            x = x + linear(inner, f"{layer}.mlp.dense_4h_to_h")
        return normed(x, "transformer.final_layernorm") @ w["word_embeddings.weight"].T


class GLM10BConditional(GLM10B):
    """The same in the class that generates."""

    architecture, outer = "GLMForConditionalGeneration", "glm."
