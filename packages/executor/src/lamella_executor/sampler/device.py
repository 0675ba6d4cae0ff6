"""Which requests are sampled where their logits are, by one kernel for all rows, and which by the host's `Sampler`."""

from __future__ import annotations

import struct
from collections.abc import Sequence as SequenceOf

from lamella_executor.sampler.logprobs import needs_logprobs
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.sequence import RequestState

SAMPLING_INTS = 11  # top_k, then temperature, top_p, min_p (float64) and the seed (128 bits), low words first
_INT32_MAX = (1 << 31) - 1
_REALS = struct.Struct("<3d")
_SEED_MASK = (1 << 128) - 1
_WORDS = struct.Struct("<10i")


def is_device_sampled(request: RequestState) -> bool:
    """Whether a request needs nothing but temperature, top-k, top-p and min-p of its own row; a fact for its life.

    It depends on the request alone, never on its neighbours, and so does the random stream that it is sampled with.
    """
    known = request.device_sampled
    if known is None:
        known = request.device_sampled = _needs_only_its_row(request)
    return known


def _needs_only_its_row(request: RequestState) -> bool:
    params = request.params
    return (
        params.width == 1
        and not params.use_beam_search
        and params.prompt_logprobs is None
        and not needs_logprobs(request)
        and not params.edits_logits
        and not request.bad_words_ids
        and params.min_tokens == 0
    )


def pack_sampling(request: RequestState) -> list[int]:
    """Returns what the device samples a request with, as SAMPLING_INTS int32; what the host samples is greedy here."""
    params = request.params
    if params.is_greedy or not is_device_sampled(request):
        temperature, top_k, top_p, min_p = 0.0, 0, 1.0, 0.0
    else:
        temperature = 1.0 if params.temperature is None else params.temperature
        top_k = min(params.top_k or 0, _INT32_MAX)
        top_p = 1.0 if params.top_p is None else params.top_p
        min_p = params.min_p or 0.0
    reals = _REALS.pack(temperature, top_p, min_p)
    return [top_k, *_WORDS.unpack(reals + (request.seed & _SEED_MASK).to_bytes(16, "little"))]


def unpack_sampling(values: SequenceOf[int]) -> tuple[SamplingParams, int]:
    """Returns parameters and a seed that `pack_sampling` turns into the same values."""
    words = _WORDS.pack(*values[1:])
    temperature, top_p, min_p = _REALS.unpack_from(words)
    seed = int.from_bytes(words[_REALS.size :], "little")
    return SamplingParams(temperature=temperature, top_k=values[0], top_p=top_p, min_p=min_p), seed
