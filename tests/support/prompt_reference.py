"""Causal attention of prompts in float32, sequence by sequence: what `prompt_attention` computes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamella_core.kernels.cuda.prompt_attention import BegunKeys


def attended(
    q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, *, scale: float, begun: BegunKeys | None = None
) -> Tensor:
    """Returns [T, Hq, D] float32, NaN in rows that belong to no sequence."""
    out = torch.full(q.shape, math.nan, device=q.device)
    lengths = [] if begun is None else begun.lengths.tolist()
    starts, gathered = query_start.tolist(), 0
    for index, (start, end) in enumerate(zip(starts, starts[1:])):
        keys, values, before = k[start:end], v[start:end], 0
        factors = (1.0, 1.0)
        if begun is not None and index < len(lengths):
            keys, values = (x[gathered : gathered + lengths[index]] for x in (begun.k, begun.v))
            gathered, before = gathered + lengths[index], lengths[index] - (end - start)
            factors = (1.0, 1.0) if begun.scales is None else tuple(begun.scales.tolist())
        group = q.shape[1] // keys.shape[1]
        keys, values = (
            (x.float() * factor).repeat_interleave(group, 1).transpose(0, 1)
            for x, factor in zip((keys, values), factors)
        )
        scores = q[start:end].float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [Hq, queries, keys]
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(before)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out[start:end] = (weights @ values).transpose(0, 1)
    return out
