"""AttentionBackend: who computes attention over the paged cache on a device, and what it is told.

Legend: T tokens of the step (packed), S sequences in it, of which the first D_ compute one token each (the decoding
ones); Hq and Hkv heads, D head size; N KV blocks of P tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from lamella_core.context import AttentionSpec
from lamella_executor.attention.paged_cpu import LayerWindow


@dataclass(frozen=True, slots=True)
class HostLengths:
    """Lengths of a step's sequences, on the host."""

    context: np.ndarray  # [S] int32, keys of each sequence including this step's
    query: np.ndarray  # [S] int32, tokens of each sequence in this step
    prefix: np.ndarray | None = None  # [S] int32, tokens that see each other; None: the model has no prefixes


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What attention needs of one step. Device tensors; in a captured step they are rewritten before each replay."""

    block_tables: Tensor  # [slots, B] int32
    table_rows: Tensor  # [S] int32: sequence i uses the row table_rows[i] of block_tables
    context_lens: Tensor  # [S] int32, this step's tokens included
    query_start: Tensor  # [S - D_ + 1] int32: first token of each sequence after the D_ first, counted from token D_
    num_decode: int  # D_
    num_tokens: int  # T
    max_query_len: int
    max_context_len: int  # bound; in a captured step, of every replay
    host: HostLengths | None  # None in a captured step: each replay has other lengths
    # [S - D_] int32: first tokens of each sequence after the D_ first that all see each other; each has computed them,
    # or does so in this step. None: the model has no prefixes
    prefix_lens: Tensor | None = None

    @property
    def num_whole(self) -> int:
        """How many sequences at the end of the step compute all their keys in it: whole prompts, or their beginnings.

        Decoding sequences do not count. In a captured step there are none.
        """
        if self.host is None:
            return 0
        begun = self.host.query[self.num_decode :] != self.host.context[self.num_decode :]
        return int(begun[::-1].argmax()) if begun.any() else len(begun)

    @property
    def is_captured(self) -> bool:
        """Whether this is being recorded in a CUDA graph: nothing may wait for a value of the device."""
        return self.host is None


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What attention needs to know of one layer."""

    spec: AttentionSpec
    window: LayerWindow
    k_cache: Tensor  # [N + 1, Hkv, P, D], this step's keys included
    v_cache: Tensor  # [N + 1, Hkv, P, D]; of a latent layer a view of k_cache: the last ``spec.value_dim`` numbers
    alibi_slopes: Tensor | None  # [Hq] float32
    sink_logits: Tensor | None  # [Hq]
    kv_scales: Tensor | None  # [2] float32, of keys and values of a float8 cache; of latents equal, only [0] has memory
    out_scale: Tensor | None  # [] float32: the result may come as float8, divided by it
    # [T - D_, Hkv, D] in the queries' dtype: rotated keys, and values, of the tokens that are not decoding; the last
    # `num_whole` sequences of the step may be attended over these instead of the cache
    own: tuple[Tensor, Tensor] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a query sees all keys up to its own, and scores are its products with them and nothing else."""
        spec = self.spec
        sees_all = not self.window.length and spec.sparsity is None and not spec.is_latent
        return sees_all and not spec.softcap and self.alibi_slopes is None and self.sink_logits is None


class StepAttention(Protocol):
    """Attention of one step. Over a latent cache results have ``spec.value_dim`` numbers instead of D."""

    def decode(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        """Returns [D_, Hq, D] for the first D_ queries, in q's dtype or, with an ``out_scale``, perhaps in float8.

        An offer: the result may be written to ``out`` [D_, Hq, D], which has the dtype it should come in.
        """
        ...

    def prefill(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        """Returns [T - D_, Hq, D] for the other queries; same dtype as `decode` returns."""
        ...

    def leads_prefill(self, q: Tensor, layer: LayerCall) -> bool:
        """Whether `prefill` of the same arguments goes through a kernel that is ahead of other backends'."""
        ...


class AttentionBackend(Protocol):
    """Computes attention over block tables that are on the device."""

    @property
    def name(self) -> str: ...

    @property
    def is_capturable(self) -> bool:
        """Whether its decoding steps can be recorded in CUDA graphs."""
        ...

    def begin(self, step: AttentionStep) -> StepAttention:
        """Prepares for a step's layers; called once per step, inside the capture of a captured one."""
        ...
