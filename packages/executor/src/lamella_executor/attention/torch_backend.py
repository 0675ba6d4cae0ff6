"""Attention through PyTorch alone, sequence by sequence: slow, but runs everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_core.kernels.cpu.reference import alibi_bias
from lamella_executor.attention.backend import AttentionStep, LayerCall

_QUERY_TILE = 256  # queries whose scores are held at a time


class TorchAttention:
    """An `AttentionBackend` for devices without triton, and for tests on a CPU."""

    name = "torch"
    is_capturable = False  # reads lengths on the host

    def begin(self, step: AttentionStep) -> _TorchStep:
        if step.host is None:
            raise RuntimeError("attention through PyTorch cannot be captured: it loops over lengths on the host")
        return _TorchStep(step)


class _TorchStep:
    def __init__(self, step: AttentionStep) -> None:
        assert step.host is not None
        self._step = step
        self._context = step.host.context.tolist()
        self._query = step.host.query.tolist()
        self._prefix = [0] * len(self._query) if step.host.prefix is None else step.host.prefix.tolist()
        self._first_whole = len(self._query) - step.num_whole

    def decode(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        return self._attend(q, layer, 0, self._step.num_decode)

    def leads_prefill(self, q: Tensor, layer: LayerCall) -> bool:
        return False

    def prefill(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        return self._attend(q, layer, self._step.num_decode, len(self._query))

    def _attend(self, q: Tensor, layer: LayerCall, first: int, last: int) -> Tensor:
        """Returns [tokens, Hq, D] of sequences ``first`` to ``last``, whose queries follow each other in ``q``."""
        out = torch.empty(*q.shape[:2], layer.spec.out_dim, dtype=q.dtype, device=q.device)
        begin = 0
        for index in range(first, last):
            length, end = self._context[index], begin + self._query[index]
            if layer.own is not None and index >= self._first_whole:
                keys, values = (x[begin:end].float() for x in layer.own)
            else:
                row = self._step.block_tables[self._step.table_rows[index]]
                keys, values = _gathered(layer, row, length)
            for start in range(begin, end, _QUERY_TILE):
                stop = min(start + _QUERY_TILE, end)
                offset = length - (end - start)  # position of the first query of the tile
                part = _attend_tile(q[start:stop], keys, values, offset, self._prefix[index], layer)
                out[start:stop] = part.to(q.dtype)
            begin = end
        return out


def _gathered(layer: LayerCall, row: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First ``length`` keys [length, Hkv, D] and values [length, Hkv, Dv] of one sequence, float32."""
    blocks = row[: -(-length // layer.k_cache.shape[2])].long()
    found = []
    for index, cache in enumerate((layer.k_cache, layer.v_cache)):
        raw = cache.view(torch.uint8) if cache.itemsize == 1 else cache  # float8 tensors cannot be indexed everywhere
        taken = raw[blocks].view(cache.dtype).transpose(1, 2).flatten(0, 1)[:length].float()
        found.append(taken if layer.kv_scales is None else taken * layer.kv_scales[index])
    return found[0], found[1]


def _attend_tile(q: Tensor, keys: Tensor, values: Tensor, offset: int, prefix: int, layer: LayerCall) -> Tensor:
    """Returns [n, Hq, Dv] float32 for queries [n, Hq, D] at positions ``offset``, ``offset + 1``, ...

    The first ``prefix`` tokens see each other.
    """
    spec, window = layer.spec, layer.window
    count, num_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    queries = q.float().view(count, kv_heads, num_heads // kv_heads, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, n, D]
    scores = torch.matmul(queries, keys.permute(1, 2, 0)[:, None]) * spec.scale  # [Hkv, G, n, L]
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    positions = torch.arange(offset, offset + count, device=q.device)[:, None]
    places = torch.arange(keys.shape[0], device=q.device)[None, :]
    distance = positions - places
    seen = (distance >= 0) | ((positions < prefix) & (places < prefix))
    if window.length > 0:
        oldest = positions // window.length * window.length if window.is_chunked else positions + 1 - window.length
        seen &= (places >= oldest) | (places < window.num_sinks)
    if layer.alibi_slopes is not None:
        bias = alibi_bias(layer.alibi_slopes, positions[:, 0], places[0], spec.scale if spec.rounds_alibi else None)
        scores = scores + bias.unflatten(0, (kv_heads, num_heads // kv_heads))
    if spec.sparsity is not None:
        seen = seen & spec.sparsity.seen(positions[:, 0], places[0], num_heads)
        seen = seen.unflatten(0, (kv_heads, num_heads // kv_heads))
    scores = scores.masked_fill(~seen, float("-inf"))
    if layer.sink_logits is not None:
        extra = layer.sink_logits.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[0]]
    mixed = torch.matmul(weights, values.permute(1, 0, 2)[:, None])  # [Hkv, G, n, Dv]
    return mixed.permute(2, 0, 1, 3).reshape(count, num_heads, values.shape[2])
