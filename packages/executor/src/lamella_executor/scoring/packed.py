"""Attention among the tokens of a step alone: a `lamella_core.context.ForwardContext` without a cache.

Legend: T tokens of the step (packed), S texts in it, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella_core.context import AttentionSpec, Communicator, RecurrentStep, SingleRank, StateSpec
from lamella_core.errors import ConfigError
from lamella_core.layers.rotary import Rotation
from lamella_core.prefix import PrefixTokens


class PackedContext:
    """Whole texts side by side. Texts of one length attend in one call.

    Args:
        lengths: tokens of each text, S of them.
        is_causal: whether a token sees only itself and those before it.
        token_types: [T] int64, which part of its text a token is in; None: all in the first.
        tp: tensor-parallel group; default: this process alone.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        is_causal: bool,
        token_types: Tensor | None = None,
        tp: Communicator | None = None,
    ) -> None:
        self.tp = tp or SingleRank()
        self.token_types = token_types
        self._is_causal = is_causal
        starts: dict[int, list[int]] = defaultdict(list)  # length -> first tokens of the texts of that length
        begin = 0
        for length in lengths:
            starts[length].append(begin)
            begin += length
        self._groups = {
            length: torch.tensor(first)[:, None] + torch.arange(length) for length, first in starts.items()
        }  # length -> [texts, length], their tokens

    def to(self, device: torch.device | str) -> PackedContext:
        """Moves what the context holds to a device, in place."""
        self._groups = {length: rows.to(device) for length, rows in self._groups.items()}
        if self.token_types is not None:
            self.token_types = self.token_types.to(device)
        return self

    @property
    def prefixes(self) -> PrefixTokens:
        """Refused: no scoring model has prefixes."""
        raise ConfigError("prefixes are not supported in scoring")

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
        """Rotates q and k, then attends within each text; returns [T, Hq, D] in q's dtype.

        Raises:
            ConfigError: the layer needs what no scoring model has: soft-caps, sparsity, chunks, sinks, ALiBi, latents.
        """
        unknown = (spec.softcap, spec.sparsity, sink_logits, alibi_slopes)
        if v is None or spec.is_chunked or any(extra is not None for extra in unknown):
            raise ConfigError("scoring knows no attention with soft-caps, sparsity, chunks, sinks, ALiBi or latents")
        if rotation is not None:
            rotation.apply_(q, k)
        out = torch.empty_like(q)
        for length, rows in self._groups.items():
            queries, keys, values = (x[rows].transpose(1, 2) for x in (q, k, v))  # [texts, heads, length, D]
            mask = self._mask(length, spec.sliding_window, q.device)
            attended = F.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=self._is_causal and mask is None, scale=spec.scale,
                enable_gqa=spec.num_heads != spec.num_kv_heads,
            )  # fmt: skip
            out[rows] = attended.transpose(1, 2)
        return out

    def kv_place(self, spec: AttentionSpec, kv_scales: Tensor | None) -> None:
        """Returns None: there is no cache."""

    def recurrent(self, spec: StateSpec) -> RecurrentStep:
        """Refused: no scoring model keeps states."""
        raise ConfigError("layers that keep a state per sequence are not supported in scoring")

    def _mask(self, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """Returns which keys [length, length] each query sees; None: what ``is_causal`` says."""
        if window is None or window >= length:
            return None
        place = torch.arange(length, device=device)
        behind = place[:, None] - place[None, :]
        near = behind < window
        return near & (behind >= 0) if self._is_causal else near & (behind > -window)
