"""Phi-3-small, from its published configurations and tensor names (Phi-3-small-8k and -128k) and Abdin et al. 2024."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tests.references.base import Reference, Shapes, turned
from tests.references.prefixed import layer_norm
from torch import Tensor


def _may_see(c: SimpleNamespace, head: int, query: int, key: int) -> bool:
    """Whether a token at place ``query`` sees ``key`` in a sparse layer."""
    if key > query:
        return False
    own, other = query // c.blocksparse_block_size, key // c.blocksparse_block_size
    shift = 0 if c.blocksparse_homo_head_pattern else max(1, c.blocksparse_vert_stride // c.num_attention_heads)
    is_column = (other + head * shift + 1) % c.blocksparse_vert_stride == 0
    return own - other < c.blocksparse_num_local_blocks or is_column


class Phi3Small(Reference):
    """Queries of a key/value head, its key and its value side by side; gates and what they gate in turns."""

    architecture, model_type = "Phi3SmallForCausalLM", "phi3small"

    @staticmethod
    def config_class(**values: object) -> SimpleNamespace:
        return SimpleNamespace(**{"tie_word_embeddings": True, **values})

    @property
    def base_model(self) -> SimpleNamespace:
        names = {name.removeprefix("model."): tensor for name, tensor in self.weights.items()}
        return SimpleNamespace(state_dict=lambda: names)

    @staticmethod
    def inner(c: SimpleNamespace) -> int:
        if getattr(c, "ff_intermediate_size", None):
            return c.ff_intermediate_size
        size = c.ff_dim_multiplier * (c.hidden_size // 3) * 2
        return size + -size % 256 if c.gegelu_pad_to_256 else size

    def shapes(self, c: SimpleNamespace) -> Shapes:
        hidden, inner = c.hidden_size, self.inner(c)
        packed = hidden + 2 * c.num_key_value_heads * (hidden // c.num_attention_heads)
        out: Shapes = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{layer}.{norm}.weight"] = out[f"{layer}.{norm}.bias"] = (hidden,)
            for name, shape in (
                ("self_attn.query_key_value", (packed, hidden)),
                ("self_attn.dense", (hidden, hidden)),
                ("mlp.up_proj", (2 * inner, hidden)),
                ("mlp.down_proj", (hidden, inner)),
            ):
                out[f"{layer}.{name}.weight"], out[f"{layer}.{name}.bias"] = shape, shape[:1]
        out["model.final_layernorm.weight"] = out["model.final_layernorm.bias"] = (hidden,)
        if not c.tie_word_embeddings:
            out["lm_head.weight"] = (c.vocab_size, hidden)
        return out

    @staticmethod
    def angles(c: SimpleNamespace, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns angles [tokens, size / 2] and what rotated elements are multiplied by [tokens].

        With factors, a token beyond the trained length turns by the long ones, as in text generated one by one.
        """
        size, scaling = c.hidden_size // c.num_attention_heads, getattr(c, "rope_scaling", None)
        rows, lengths = [], []
        for place in range(tokens):
            kind, factors = "", [1.0] * (size // 2)
            if scaling is not None:
                kind = "long" if place >= scaling["original_max_position_embeddings"] else "short"
                factors = scaling[f"{kind}_factor"]
            rows.append([place / f / c.rope_embedding_base ** (2 * j / size) for j, f in enumerate(factors)])
            lengths.append(scaling[f"{kind}_mscale"] if kind else 1.0)
        return torch.tensor(rows).double(), torch.tensor(lengths).double()

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def normed(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c.layer_norm_epsilon)

        tokens, heads, groups = len(ids), c.num_attention_heads, c.num_key_value_heads
        size, shared = c.hidden_size // heads, heads // groups
        angles, stretch = self.angles(c, tokens)
        x = w["model.embed_tokens.weight"][ids] * c.mup_embedding_multiplier
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}"
            is_dense = bool(c.dense_attention_every_n_layers) and (i + 1) % c.dense_attention_every_n_layers == 0
            y = linear(normed(x, f"{layer}.input_layernorm"), f"{layer}.self_attn.query_key_value")
            y = y.view(tokens, groups, shared + 2, size)
            out = []
            for head in range(heads):
                q, k, v = y[:, head // shared, head % shared], y[:, head // shared, -2], y[:, head // shared, -1]
                q, k = (turned(part[:, None], angles)[:, 0] * stretch[:, None] for part in (q, k))
                scores = q @ k.T * c.mup_attn_multiplier / size
                for a in range(tokens):
                    for b in range(tokens):
                        if not (b <= a if is_dense else _may_see(c, head, a, b)):
                            scores[a, b] = -torch.inf
                out.append(torch.softmax(scores, dim=1) @ v)
            x = x + linear(torch.cat(out, dim=1), f"{layer}.self_attn.dense")
            y = linear(normed(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.up_proj")
            gate, up = y[:, 0::2].clamp(max=c.gegelu_limit), y[:, 1::2].clamp(-c.gegelu_limit, c.gegelu_limit)
            x = x + linear(gate * torch.special.expit(1.702 * gate) * (up + 1), f"{layer}.mlp.down_proj")
        head = w["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
        return normed(x, "model.final_layernorm") @ head.T / c.mup_width_multiplier
