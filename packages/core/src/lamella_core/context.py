"""What a model's forward pass gets from the runtime: attention over caches, and communication between ranks.

A model never sees a block table: it calls `ForwardContext.attend` and the runtime (paged CPU, CUDA, a reference, ...)
answers. Nothing here is global; two engines in one process hold two contexts.

Shape legend: T tokens of this step (packed, no padding); on this rank Hq query and Hkv key/value heads; D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lamella_core.kernels.sparsity import BlockSparsity

if TYPE_CHECKING:
    from lamella_core.layers.rotary import Rotation
    from lamella_core.prefix import PrefixTokens


@dataclass(frozen=True)
class AttentionSpec:
    """What the runtime must know of one attention layer, on this rank; the source of the KV cache's shape."""

    layer_idx: int  # global index of the layer in the model
    num_heads: int  # Hq on this rank
    num_kv_heads: int  # Hkv on this rank
    head_dim: int  # D
    scale: float  # multiplies q.k
    sliding_window: int | None = None  # a query sees this many last keys, its own included
    is_chunked: bool = False  # keys are cut into chunks of sliding_window, and a query sees its own chunk instead
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    value_dim: int | None = None  # of a latent cache: values are the last value_dim numbers of keys, and not stored
    sparsity: BlockSparsity | None = None  # the keys that each head sees; None: all that the rest lets it see
    # ALiBi is added to q.k before ``scale``, as bfloat16(slope * bfloat16(key's position)): as it depends on no query,
    # rounding makes it other than by distance. False: slope * (key's position less the query's), after ``scale``
    rounds_alibi: bool = False

    @property
    def is_latent(self) -> bool:
        """Whether the cache holds keys alone."""
        return self.value_dim is not None

    @property
    def out_dim(self) -> int:
        """Numbers of one head's result."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def cache_width(self) -> int:
        """Numbers that the cache holds of one token."""
        return self.num_kv_heads * self.head_dim * (1 if self.is_latent else 2)


@dataclass(frozen=True)
class StateSpec:
    """What the runtime must know of one layer that keeps a state of fixed size per sequence, on this rank."""

    layer_idx: int  # global index of the layer in the model
    shapes: tuple[tuple[int, ...], ...]  # of one sequence's states, e.g. a convolution's window and a scan's state
    dtypes: tuple[torch.dtype, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence's states."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes))


@dataclass(frozen=True)
class RecurrentStep:
    """One step of a layer with states: S sequences, of which the first ``num_decode`` compute one token each.

    Sequence i's tokens follow those of sequence i - 1. States are read and written in place, at ``slots``.
    """

    pools: tuple[torch.Tensor, ...]  # [slots + 1, *shape] of each of the layer's states; the last slot is scratch
    slots: torch.Tensor  # [S] int32: where each sequence's states are
    is_first: torch.Tensor  # [S] bool: the sequence starts here, with states of zero, whatever its slot holds
    query_start: torch.Tensor  # [S - num_decode + 1] int32: first token of each other sequence, after the num_decode;
    # of no meaning if there are none
    num_decode: int
    max_query_len: int  # tokens of one of the others at most; 1 if there are none


class PlacedAttention(Protocol):
    """Attention of one layer and step whose keys and values are in the cache already."""

    def __call__(
        self,
        q: torch.Tensor,  # [T, Hq, D], rotated
        *,
        alibi_slopes: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
        out_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns [T, Hq, D]; see `ForwardContext.attend`."""
        ...


@dataclass(frozen=True)
class KvPlace:
    """Where a step's keys and values go in one layer's cache, for a projection that stores them itself.

    N blocks of P tokens. Once they are there, ``attend`` does the rest.
    """

    k_cache: torch.Tensor  # [N, Hkv, P, D] in the model's dtype or float8_e4m3fn; each block is contiguous
    v_cache: torch.Tensor  # like k_cache
    slots: torch.Tensor  # [T] int64: block * P + offset; negative: nowhere
    scales: torch.Tensor | None  # [2] float32: keys and values in a float8 cache are divided by them; None: by 1
    attend: PlacedAttention


class Communicator(Protocol):
    """Collectives among the ranks of one group; what layers use instead of process globals."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the group, same shape."""
        ...

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Returns the ranks' tensors concatenated along ``dim`` in rank order."""
        ...

    def rms_norm_of_sum(
        self,
        x: torch.Tensor,  # [T, H], this rank's summand
        residual: torch.Tensor,  # [T, H]
        weight: torch.Tensor,  # [H]
        eps: float,
        out_scale: torch.Tensor | None = None,
        unit_offset: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns what `lamella_core.kernels.ops.rms_norm` does of ``all_reduce(x)``; None if that takes two kernels.

        All ranks get None, or none does.
        """
        ...


class SingleRank:
    """The `Communicator` of a group of one: every collective is the identity."""

    size = 1
    rank = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return x

    def rms_norm_of_sum(self, *arguments: Any) -> None:
        return None


class ForwardContext(Protocol):
    """One step's view of the runtime, made by the runner and passed down through every `forward`."""

    @property
    def tp(self) -> Communicator:
        """The tensor-parallel group of this rank."""
        ...

    @property
    def prefixes(self) -> PrefixTokens:
        """Where the step's tokens are in texts with prefixes; only for models with a `ModelConfig.prefix_rule`.

        Attention knows the prefixes by itself.
        """
        ...

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,  # [T, Hq, D]
        k: torch.Tensor,  # [T, Hkv, D]
        v: torch.Tensor | None,  # [T, Hkv, D]; None: the cache is latent
        *,
        rotation: Rotation | None = None,  # applied to q and k first, in place; None: nothing to apply
        alibi_slopes: torch.Tensor | None = None,  # [Hq] float32
        sink_logits: torch.Tensor | None = None,  # [Hq], extra softmax column per head
        kv_scales: torch.Tensor | None = None,  # [2] float32, of keys and values in a float8 cache
        out_scale: torch.Tensor | None = None,  # [] float32: the result may come as float8, divided by it
    ) -> torch.Tensor:
        """Stores k and v in the layer's cache, then attends causally over each request's keys; returns [T, Hq, D].

        A latent cache (``spec.value_dim``) has no values beside the keys; the result is then [T, Hq, value_dim], and
        the first of ``kv_scales`` holds for both.

        A runtime may ignore ``out_scale`` and return q's dtype.
        """
        ...

    def kv_place(self, spec: AttentionSpec, kv_scales: torch.Tensor | None) -> KvPlace | None:
        """Returns where the layer's keys and values go; None: only `attend` can store them."""
        ...

    def recurrent(self, spec: StateSpec) -> RecurrentStep:
        """Returns where the states of a layer are in this step."""
        ...
