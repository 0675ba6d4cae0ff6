"""One text computed whole and alone, without a cache: a `lamella_core.context.ForwardContext` as plain as can be.

Legend: T tokens of the text, Hq query and Hkv key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_core.context import AttentionSpec, RecurrentStep, SingleRank, StateSpec
from lamella_core.kernels.cpu.reference import alibi_bias
from lamella_core.layers.rotary import Rotation
from lamella_core.models.base import CausalLM
from lamella_core.prefix import Prefix, PrefixTokens


class WholeText:
    """Attention over all scores at once, [Hq, T, T]; states start with zeros. On the CPU.

    Args:
        num_tokens: T.
        is_causal: whether a token sees only itself and those before it.
        prefix: beginning of the text whose tokens all see each other, of models that have some.
    """

    token_types: Tensor | None = None  # all tokens are in the first part of the text

    def __init__(self, num_tokens: int, *, is_causal: bool = True, prefix: Prefix | None = None) -> None:
        self.tp = SingleRank()
        self._num_tokens = num_tokens
        self._is_causal = is_causal
        self._prefix = prefix or Prefix(0, 0)

    @property
    def prefixes(self) -> PrefixTokens:
        """The prefix, once for each token."""
        count = self._num_tokens
        lengths, places = self._prefix.num_tokens, self._prefix.mask_place
        return PrefixTokens(torch.full((count,), lengths), torch.full((count,), places))

    def attend(  # noqa: PLR0913 - as the protocol has it
        self,
        spec: AttentionSpec,
        q: Tensor,  # [T, Hq, D]
        k: Tensor,  # [T, Hkv, D]
        v: Tensor | None,  # [T, Hkv, D]
        *,
        rotation: Rotation | None = None,
        alibi_slopes: Tensor | None = None,
        sink_logits: Tensor | None = None,
        kv_scales: Tensor | None = None,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        """Returns [T, Hq, D], or [T, Hq, value_dim] of latents; keys and values are not rounded to any cache."""
        if rotation is not None:
            rotation.apply_(q, k)
        if v is None:
            v = k[..., spec.head_dim - spec.out_dim :]
        group = spec.num_heads // spec.num_kv_heads
        keys, values = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # [Hq, T, D]
        scores = q.float().transpose(0, 1) @ keys.mT * spec.scale  # [Hq, T, T]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        place = torch.arange(self._num_tokens)
        distance = place[:, None] - place[None, :]
        if alibi_slopes is not None:
            scores = scores + alibi_bias(alibi_slopes, place, place, spec.scale if spec.rounds_alibi else None)
        scores = scores.masked_fill(~self._seen(spec, place, distance), float("-inf"))
        if sink_logits is not None:
            scores = torch.cat([scores, sink_logits.float()[:, None, None].expand(-1, self._num_tokens, 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : self._num_tokens]
        return (weights @ values).transpose(0, 1).to(q.dtype)

    def _seen(self, spec: AttentionSpec, place: Tensor, distance: Tensor) -> Tensor:
        """Returns which keys each query sees, [T, T] or [Hq, T, T] bool."""
        in_prefix = place < self._prefix.num_tokens
        seen = (distance >= 0) | (in_prefix[:, None] & in_prefix[None, :]) | (not self._is_causal)
        window = spec.sliding_window
        if window is not None and spec.is_chunked:
            seen &= place[:, None] // window == place[None, :] // window
        elif window is not None:
            seen &= distance.abs() < window
        return seen if spec.sparsity is None else seen & spec.sparsity.seen(place, place, spec.num_heads)

    def kv_place(self, spec: AttentionSpec, kv_scales: Tensor | None) -> None:
        """Returns None: there is no cache."""

    def recurrent(self, spec: StateSpec) -> RecurrentStep:
        """Returns the step of a layer whose states start here and are forgotten."""
        shapes = zip(spec.shapes, spec.dtypes, strict=True)
        return RecurrentStep(
            pools=tuple(torch.zeros(2, *shape, dtype=dtype) for shape, dtype in shapes),
            slots=torch.zeros(1, dtype=torch.int32),
            is_first=torch.ones(1, dtype=torch.bool),
            query_start=torch.tensor([0, self._num_tokens], dtype=torch.int32),
            num_decode=0,
            max_query_len=self._num_tokens,
        )


def whole_logits(model: CausalLM, ids: list[int], num_prompt: int | None = None) -> Tensor:
    """Returns what a model's output layer says of each token of a text, [T, vocab_size or labels] float32.

    The first ``num_prompt`` tokens (None: all) are the prompt, which says what the prefix is where a model has one.
    """
    rule = model.config.prefix_rule
    ctx = WholeText(len(ids), is_causal=model.is_causal, prefix=rule.of(ids[:num_prompt]) if rule else None)
    return model.compute_logits(model(torch.tensor(ids), torch.arange(len(ids)), ctx), ctx)
