"""Paged attention on a device: the KV cache's tensors, and one step's ForwardContext over them.

Legend: T tokens of the step (packed), of which the first D_ belong to sequences that compute one token; N KV blocks of
P tokens; Hq and Hkv heads, D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lamella_core.context import AttentionSpec, Communicator, KvPlace, RecurrentStep, StateSpec
from lamella_core.kernels.cuda.prompt_attention import serves
from lamella_core.layers.rotary import Rotation
from lamella_core.prefix import PrefixTokens
from lamella_executor.attention.backend import AttentionStep, LayerCall, StepAttention
from lamella_executor.attention.paged_cpu import LayerWindow
from lamella_executor.attention.states import RecurrentStates, StepStates

COPY_TILE = 16  # blocks copied at a time: bounds the temporary memory


class DeviceKvCache:
    """Keys and values of every attention layer on a device; owns the memory, which is zero at first.

    Layers of one shape share an allocation. Latent ones have keys alone, of which values are a view. Block N, one more
    than there are, is scratch: rows that only pad a step write there.
    """

    def __init__(
        self,
        specs: SequenceOf[AttentionSpec],
        num_blocks: int,
        tokens_per_block: int,
        dtype: torch.dtype,
        device: torch.device | str,
        states: RecurrentStates | None = None,  # of layers without keys and values, beside them
    ) -> None:
        self.states = states
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.dtype = dtype
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pools: list[Tensor] = []  # [2 * layers (latent: layers), N + 1, Hkv, P, D], as bytes if float8
        alike: dict[tuple[int, int, bool], list[AttentionSpec]] = defaultdict(list)
        for spec in specs:
            alike[spec.num_kv_heads, spec.head_dim, spec.is_latent].append(spec)
        for (kv_heads, head_dim, is_latent), members in alike.items():
            count = len(members) * (1 if is_latent else 2)
            shape = (count, num_blocks + 1, kv_heads, tokens_per_block, head_dim)
            raw = torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype, device=device)
            self._pools.append(raw)
            pool = raw.view(dtype)
            for place, spec in enumerate(members):
                if is_latent:
                    self._layers[spec.layer_idx] = (pool[place], pool[place][..., head_dim - spec.out_dim :])
                else:
                    self._layers[spec.layer_idx] = (pool[2 * place], pool[2 * place + 1])

    @property
    def scratch_block(self) -> int:
        return self.num_blocks

    @property
    def is_float8(self) -> bool:
        return self.dtype.itemsize == 1

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools) + (self.states.num_bytes if self.states is not None else 0)

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, each [N + 1, Hkv, P, D]."""
        return self._layers[layer_idx]

    def copy_blocks(self, sources: Tensor, destinations: Tensor) -> None:
        """Copies whole blocks in every layer; [n] int64 each, on the device.

        No source may also be a destination, and no destination may come twice.
        """
        for start in range(0, sources.shape[0], COPY_TILE):
            source, destination = sources[start : start + COPY_TILE], destinations[start : start + COPY_TILE]
            for pool in self._pools:
                pool.index_copy_(1, destination, pool.index_select(1, source))


class RopeAndCache(Protocol):
    """Rotates q [T, Hq, D] and k [T, Hkv, D], and stores k and v at ``slots`` [T] int64; q is rotated in place.

    So is k if ``rotate_keys``; it may be anyway. Without v nothing is stored of it.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        rotation: Rotation | None,
        caches: tuple[Tensor, Tensor],
        slots: Tensor,
        kv_scales: Tensor | None,
        rotate_keys: bool = False,
    ) -> None: ...


class CudaStepContext:
    """One step's `lamella_core.context.ForwardContext` over a cache on a device."""

    def __init__(  # noqa: PLR0913 - what a step is made of
        self,
        cache: DeviceKvCache,
        slots: Tensor,  # [T] int64: block * P + offset, where a token's keys and values go
        step: AttentionStep,
        attention: StepAttention,
        rope_and_cache: RopeAndCache,
        windows: dict[int, LayerWindow],
        tp: Communicator,
        states: StepStates | None = None,  # of a model that has some
        prefixes: PrefixTokens | None = None,  # likewise
    ) -> None:
        self._cache = cache
        self._prefixes = prefixes
        self._step = step
        self._has_own = step.num_whole > 0
        self._slots = slots
        self._num_decode = step.num_decode
        self._states = states
        self._is_first = states.is_first.bool() if states is not None else None
        self._attention = attention
        self._rope_and_cache = rope_and_cache
        self._windows = windows
        self.tp = tp

    @property
    def prefixes(self) -> PrefixTokens:
        """Where the step's tokens are in texts with prefixes.

        Raises:
            RuntimeError: the model has none.
        """
        if self._prefixes is None:
            raise RuntimeError("the step was packed for a model without prefixes")
        return self._prefixes

    def attend(  # noqa: PLR0913 - as the protocol has it
        self,
        spec: AttentionSpec,
        q: Tensor,  # [T, Hq, D]
        k: Tensor,  # [T, Hkv, D]
        v: Tensor | None,  # [T, Hkv, D]; None: the cache is latent
        *,
        rotation: Rotation | None = None,
        alibi_slopes: Tensor | None = None,
        sink_logits: Tensor | None = None,
        kv_scales: Tensor | None = None,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        """Rotates, writes this step's keys and values, then attends over the cache; returns [T, Hq, D].

        Prompts that begin in this step may attend over their own keys and values: they need nothing else, and these
        are neither rounded to float8 nor to be looked up. Without either gain, and in latent layers, the cache is read.
        """
        caches = self._cache.layer(spec.layer_idx)
        scales = kv_scales if self._cache.is_float8 else None
        if spec.is_latent and scales is not None:
            scales = scales[:1].expand(2)  # keys and values are the same numbers
        has_own = self._has_own and v is not None and (self._cache.is_float8 or serves(q, spec.num_kv_heads))
        self._rope_and_cache(q, k, v, rotation, caches, self._slots, scales, has_own)
        own = (k[self._num_decode :], v[self._num_decode :]) if has_own and v is not None else None
        return self._attend(
            q, spec, scales, own, alibi_slopes=alibi_slopes, sink_logits=sink_logits, out_scale=out_scale
        )  # fmt: skip

    def kv_place(self, spec: AttentionSpec, kv_scales: Tensor | None) -> KvPlace | None:
        """Returns where the layer's keys and values go; None for latent ones, and where attention may need them too.

        See `attend` for when it may.
        """
        if spec.is_latent or self._has_own:
            return None
        scales = kv_scales if self._cache.is_float8 else None
        attend = partial(self._attend, spec=spec, scales=scales)
        return KvPlace(*self._cache.layer(spec.layer_idx), self._slots, scales, attend)

    def _attend(
        self,
        q: Tensor,  # [T, Hq, D], rotated
        spec: AttentionSpec,
        scales: Tensor | None,
        own: tuple[Tensor, Tensor] | None = None,
        *,
        alibi_slopes: Tensor | None = None,
        sink_logits: Tensor | None = None,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        """Attends over the cache, which has this step's keys and values."""
        num_decode = self._num_decode
        call = LayerCall(
            spec, self._windows[spec.layer_idx], *self._cache.layer(spec.layer_idx), alibi_slopes, sink_logits, scales,
            out_scale, own,
        )  # fmt: skip
        if num_decode == q.shape[0]:
            return self._attention.decode(q, call)
        if num_decode == 0:
            return self._attention.prefill(q, call)
        dtype = q.dtype if out_scale is None else torch.float8_e4m3fn
        out = torch.empty(*q.shape[:2], spec.out_dim, dtype=dtype, device=q.device)
        first = self._attention.decode(q[:num_decode], call, out[:num_decode])
        rest = self._attention.prefill(q[num_decode:], call, out[num_decode:])
        is_there = first.data_ptr() == out.data_ptr() and rest.data_ptr() == out[num_decode:].data_ptr()
        return out if is_there else torch.cat((first, rest))

    def recurrent(self, spec: StateSpec) -> RecurrentStep:
        """Returns where the states of a layer are in this step.

        Raises:
            RuntimeError: the step's sequences have no slots.
        """
        states, where, step = self._cache.states, self._states, self._step
        if states is None or where is None or self._is_first is None:
            raise RuntimeError(f"layer {spec.layer_idx} has states, and the step's sequences have no slots for them")
        pools = states.layer(spec.layer_idx)
        return RecurrentStep(
            pools, where.slots, self._is_first, step.query_start, step.num_decode, step.max_query_len
        )  # fmt: skip


def torch_rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rotation: Rotation | None,
    caches: tuple[Tensor, Tensor],
    slots: Tensor,
    kv_scales: Tensor | None,
    rotate_keys: bool = False,
) -> None:
    """`RopeAndCache` through PyTorch, for devices without triton."""
    if rotation is not None:
        rotation.apply_(q, k)
    for index, (rows, cache) in enumerate(zip((k,) if v is None else (k, v), caches)):
        size = cache.shape[2]
        blocks, offsets = slots // size, slots % size
        if cache.itemsize == 1:
            wide = rows.float() if kv_scales is None else rows.float() / kv_scales[index]
            limit = torch.finfo(cache.dtype).max
            cache.view(torch.uint8)[blocks, :, offsets] = wide.clamp(-limit, limit).to(cache.dtype).view(torch.uint8)
        else:
            cache[blocks, :, offsets] = rows.to(cache.dtype)


def triton_rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rotation: Rotation | None,
    caches: tuple[Tensor, Tensor],
    slots: Tensor,
    kv_scales: Tensor | None,
    rotate_keys: bool = False,
) -> None:
    """`RopeAndCache` in one kernel."""
    from lamella_core.kernels.triton.rope_cache import rope_and_cache

    cos, sin, rotary_dim, interleaved = None, None, 0, False
    if rotation is not None:
        cos, sin = rotation.cos, rotation.sin
        rotary_dim, interleaved = rotation.rotary_dim, rotation.interleaved
    rope_and_cache(q, k, v, cos, sin, rotary_dim, interleaved, *caches, slots, kv_scales, rotate_keys)
