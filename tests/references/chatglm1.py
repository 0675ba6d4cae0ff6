"""ChatGLM-6B, from its published configuration, tensor names and the description of GLM-130B (Zeng et al. 2022)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tests.references.base import Shapes, turned
from tests.references.prefixed import PrefixedReference, attended_with_prefix, gelu, layer_norm
from torch import Tensor


def _angles(places: Tensor, size: int) -> Tensor:
    """Angles [T, size / 2]; the speeds were stored in half precision."""
    speeds = torch.tensor([1 / 10000.0 ** (2 * pair / size) for pair in range(size // 2)]).half().double()
    return places.double()[:, None] * speeds


class ChatGLM1(PrefixedReference):
    """Queries, keys and values side by side per head; residuals are sqrt(2 layers) times what the norms return."""

    architecture, model_type, published_name = "ChatGLM1Model", "chatglm", "ChatGLMModel"

    @staticmethod
    def config_class(**values: object) -> SimpleNamespace:
        return SimpleNamespace(**{"tie_word_embeddings": True, **values})

    @property
    def base_model(self) -> SimpleNamespace:
        """The decoder without the output layer, which is tied."""
        names = {name.removeprefix("transformer."): tensor for name, tensor in self.weights.items()}
        return SimpleNamespace(state_dict=lambda: {k: v for k, v in names.items() if k != "lm_head.weight"})

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, inner = c.hidden_size, c.inner_hidden_size
        out: Shapes = {"transformer.word_embeddings.weight": (c.vocab_size, hidden)}
        for i in range(c.num_layers):
            layer = f"transformer.layers.{i}"
            out[f"{layer}.attention.rotary_emb.inv_freq"] = (hidden // c.num_attention_heads // 4,)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{layer}.{norm}.weight"] = out[f"{layer}.{norm}.bias"] = (hidden,)
            for name, shape in (
                ("attention.query_key_value", (3 * hidden, hidden)),
                ("attention.dense", (hidden, hidden)),
                ("mlp.dense_h_to_4h", (inner, hidden)),
                ("mlp.dense_4h_to_h", (hidden, inner)),
            ):
                out[f"{layer}.{name}.weight"], out[f"{layer}.{name}.bias"] = shape, shape[:1]
        out["transformer.final_layernorm.weight"] = out["transformer.final_layernorm.bias"] = (hidden,)
        if not c.tie_word_embeddings:
            out["lm_head.weight"] = (c.vocab_size, hidden)
        return out

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def normed(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c.layernorm_epsilon)

        length, own, block = self.positions(ids, c.bos_token_id, [[c.gmask_token_id], [c.mask_token_id]])
        heads, size = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        angles = (_angles(own, size // 2), _angles(block, size // 2))
        wide = (2 * c.num_layers) ** 0.5
        x = w["transformer.word_embeddings.weight"][ids]
        for i in range(c.num_layers):
            layer = f"transformer.layers.{i}"
            x = normed(x, f"{layer}.input_layernorm")
            packed = linear(x, f"{layer}.attention.query_key_value").view(len(ids), heads, 3 * size)
            q, k, v = packed.split(size, dim=2)
            q, k = (
                torch.cat([turned(half, a) for half, a in zip(part.chunk(2, dim=2), angles, strict=True)], dim=2)
                for part in (q, k)
            )
            x = x * wide + linear(attended_with_prefix(q, k, v, length), f"{layer}.attention.dense")
            x = normed(x, f"{layer}.post_attention_layernorm")
            x = x * wide + linear(gelu(linear(x, f"{layer}.mlp.dense_h_to_4h")), f"{layer}.mlp.dense_4h_to_h")
        head = w["transformer.word_embeddings.weight" if c.tie_word_embeddings else "lm_head.weight"]
        return normed(x, "transformer.final_layernorm") @ head.T
