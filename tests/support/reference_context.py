"""A `ForwardContext` that is slow and obviously right, and ranks simulated by threads.

Keys and values of each request lie contiguous in float32 tensors; every query is attended by itself, so a token's
result cannot depend on chunking or on other requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from lamella_core.context import AttentionSpec, Communicator, RecurrentStep, SingleRank, StateSpec
from lamella_core.layers.rotary import Rotation
from lamella_core.prefix import Prefix, PrefixTokens

STATE_SLOTS = 32  # no multiple of 3: `ReferenceCache.slot` gives each once


@dataclass
class ReferenceCache:
    """Keys and values of all requests: (request, layer) -> tensors [tokens so far, Hkv, D]; states of all layers."""

    keys: dict[tuple[Hashable, int], torch.Tensor] = field(default_factory=dict)
    values: dict[tuple[Hashable, int], torch.Tensor] = field(default_factory=dict)
    lengths: dict[Hashable, int] = field(default_factory=dict)  # tokens whose forward pass is done
    states: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)  # layer -> pools of STATE_SLOTS + 1
    slots: dict[Hashable, int] = field(default_factory=dict)  # request -> its place in them
    prefixes: dict[Hashable, Prefix] = field(default_factory=dict)  # of models that have some

    def append(
        self, request: Hashable, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for store, new in ((self.keys, k), (self.values, v)):
            old = store.get((request, layer), new[:0])
            store[request, layer] = torch.cat((old, new))
        return self.keys[request, layer], self.values[request, layer]

    def pools(self, spec: StateSpec) -> tuple[torch.Tensor, ...]:
        """Returns a layer's states, which hold nonsense where nothing was written."""
        if spec.layer_idx not in self.states:
            shapes = zip(spec.shapes, spec.dtypes, strict=True)
            self.states[spec.layer_idx] = tuple(torch.full((STATE_SLOTS + 1, *s), 7.5, dtype=d) for s, d in shapes)
        return self.states[spec.layer_idx]

    def slot(self, request: Hashable) -> int:
        return self.slots.setdefault(request, (3 * len(self.slots) + 5) % STATE_SLOTS)


class ReferenceContext:
    """One step over ``segments``: (request, number of its tokens in this step), packed in that order."""

    def __init__(
        self, cache: ReferenceCache, segments: list[tuple[Hashable, int]], tp: Communicator | None = None
    ) -> None:
        self.cache = cache
        self.segments = segments
        self.tp = tp or SingleRank()

    @property
    def prefixes(self) -> PrefixTokens:
        own = [self.cache.prefixes[request] for request, count in self.segments for _ in range(count)]
        return PrefixTokens(torch.tensor([p.num_tokens for p in own]), torch.tensor([p.mask_place for p in own]))

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        *,
        rotation: Rotation | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
        kv_scales: torch.Tensor | None = None,
        out_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if rotation is not None:
            rotation.apply_(q, k)
        assert q.shape[1:] == (spec.num_heads, spec.head_dim) and k.shape[1:] == (spec.num_kv_heads, spec.head_dim)
        if v is None:  # a latent cache: values are a part of the keys, rounded as these are
            v = k[..., spec.head_dim - spec.out_dim :]
            kv_scales = None if kv_scales is None else kv_scales[:1].expand(2)
        assert sum(count for _, count in self.segments) == q.shape[0] == k.shape[0] == v.shape[0]
        out, begin = [], 0
        for request, count in self.segments:
            rows = slice(begin, begin + count)
            new_keys, new_values = k[rows].float(), v[rows].float()
            if kv_scales is not None:
                new_keys, new_values = _rounded(new_keys, kv_scales[0]), _rounded(new_values, kv_scales[1])
            keys, values = self.cache.append(request, spec.layer_idx, new_keys, new_values)
            first = keys.shape[0] - count
            prefix = self.cache.prefixes[request].num_tokens if request in self.cache.prefixes else 0
            for position in range(first, first + count):
                visible = slice(_first_visible(spec, position), prefix if position < prefix else position + 1)
                query = q[begin + position - first].float()
                gaps = _gaps(spec, position) if spec.sparsity is not None else None
                bias = None if alibi_slopes is None else _alibi(spec, alibi_slopes, visible, position)
                out.append(_attend_one(spec, query, keys[visible], values[visible], bias, sink_logits, gaps))
            begin += count
        return torch.stack(out).to(q.dtype) if out else q.new_zeros(*q.shape[:2], spec.out_dim)

    def kv_place(self, spec: AttentionSpec, kv_scales: torch.Tensor | None) -> None:
        return None

    def recurrent(self, spec: StateSpec) -> RecurrentStep:
        cache, requests = self.cache, [request for request, _ in self.segments]
        ends = torch.tensor([count for _, count in self.segments]).cumsum(0)
        return RecurrentStep(
            pools=cache.pools(spec),
            slots=torch.tensor([cache.slot(request) for request in requests], dtype=torch.int32),
            is_first=torch.tensor([not cache.lengths.get(request) for request in requests]),
            query_start=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int(),
            num_decode=0,
            max_query_len=max(count for _, count in self.segments),
        )


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a float8 cache with this scale keeps of x."""
    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


def _first_visible(spec: AttentionSpec, position: int) -> int:
    if spec.sliding_window is None:
        return 0
    if spec.is_chunked:
        return position - position % spec.sliding_window
    return max(0, position - spec.sliding_window + 1)


def _gaps(spec: AttentionSpec, position: int) -> torch.Tensor:
    """Which of the keys up to ``position`` each head does not see: [Hq, position + 1] bool."""
    s, own = spec.sparsity, position // spec.sparsity.block_size
    return torch.tensor([
        [
            own - block >= s.num_local_blocks and (block + (s.first_head + head) * s.head_step + 1) % s.vert_stride != 0
            for block in (key // s.block_size for key in range(position + 1))
        ]
        for head in range(spec.num_heads)
    ])  # fmt: skip


def _alibi(spec: AttentionSpec, slopes: torch.Tensor, visible: slice, position: int) -> torch.Tensor:
    """What ALiBi adds to the scores of the visible keys: [Hq, keys]."""
    keys = torch.arange(visible.start, visible.stop)
    if spec.rounds_alibi:
        return spec.scale * (slopes[:, None].bfloat16() * keys).float()
    return slopes[:, None] * (keys - position)


def _attend_one(
    spec: AttentionSpec,
    query: torch.Tensor,  # [Hq, D]
    keys: torch.Tensor,  # [n, Hkv, D]
    values: torch.Tensor,  # [n, Hkv, D]
    bias: torch.Tensor | None,  # [Hq, n]
    sink_logits: torch.Tensor | None,
    gaps: torch.Tensor | None,  # [Hq, n] bool: keys that a head does not see
) -> torch.Tensor:
    group = spec.num_heads // spec.num_kv_heads
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.bmm(query[:, None], keys.permute(1, 2, 0))[:, 0] * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + bias
    if gaps is not None:
        scores = scores.masked_fill(gaps, float("-inf"))
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.float()[:, None]), dim=1)
    weights = torch.softmax(scores, dim=-1)[:, : keys.shape[0]]
    return torch.bmm(weights[:, None], values.transpose(0, 1))[:, 0]


@torch.no_grad()
def forward_step(
    model: Any,
    cache: ReferenceCache,
    tokens: dict[Hashable, list[int]],
    tp: Communicator | None = None,
    stages: list[Any] | None = None,
) -> dict[Hashable, torch.Tensor]:
    """Runs the next tokens of each request in one step; returns all their logits, [tokens of the request, vocab].

    ``stages`` are the further pipeline stages after ``model``, run one after the other.
    """
    segments = [(request, len(ids)) for request, ids in tokens.items()]
    rule = model.config.prefix_rule
    if rule is not None:  # what comes first is the prompt
        cache.prefixes.update(
            {request: rule.of(ids) for request, ids in tokens.items() if request not in cache.lengths}
        )
    ctx = ReferenceContext(cache, segments, tp)
    ids = torch.tensor([token for chunk in tokens.values() for token in chunk])
    starts = {request: cache.lengths.get(request, 0) for request in tokens}
    positions = torch.cat([torch.arange(starts[r], starts[r] + count) for r, count in segments])
    hidden = model(ids, positions, ctx)
    for stage in stages or []:
        model = stage
        hidden = stage(ids, positions, ctx, hidden=hidden)
    logits = model.compute_logits(hidden, ctx)
    cache.lengths.update({request: starts[request] + count for request, count in segments})
    return dict(zip(tokens, logits.split([count for _, count in segments]), strict=True))


def greedy(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Returns ``num_tokens`` greedy tokens for each prompt, all prompts batched."""
    cache = ReferenceCache()
    pending: dict[Hashable, list[int]] = dict(enumerate(prompts))
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        logits = forward_step(model, cache, pending)
        pending = {request: [int(rows[-1].argmax())] for request, rows in logits.items()}
        for request, (token,) in pending.items():
            out[request].append(token)
    return out


class ThreadGroup:
    """Collectives among ``size`` threads of this process: `communicator` gives each rank its `Communicator`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def communicator(self, rank: int) -> ThreadCommunicator:
        return ThreadCommunicator(self, rank)

    def exchange(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        self._slots[rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def abort(self) -> None:
        self._barrier.abort()


class ThreadCommunicator:
    """A rank's view of a `ThreadGroup`."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        values = self._group.exchange(self.rank, x)
        return torch.stack(values).sum(0)

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._group.exchange(self.rank, x), dim=dim)

    def rms_norm_of_sum(self, *arguments: Any) -> None:
        return None


def run_ranks(size: int, work: Callable[[int, Communicator], Any]) -> list[Any]:
    """Calls ``work(rank, communicator)`` in one thread per rank; returns the results, or raises the first error."""
    group = ThreadGroup(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, group.communicator(rank))
        except BaseException as error:
            errors.append(error)
            group.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
