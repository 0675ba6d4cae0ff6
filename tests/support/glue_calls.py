"""One call of each glue kernel in each of its variants, for `tests.support.triton_compiler`."""

from __future__ import annotations

import torch

from lamella_core.kernels.triton import activation, norm, quantize, rope_cache, sampling

BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn


def calls() -> None:
    x, weight, scale = torch.zeros(16, 4096, dtype=BF16), torch.zeros(4096, dtype=BF16), torch.ones(())
    norm.rms_norm(x, weight, 1e-5, x)
    norm.rms_norm(x, weight, 1e-5, x, scale)
    norm.rms_norm(x.view(-1, 128), weight[:128], 1e-5)
    norm.rms_norm(x, weight, 1e-5, x, unit_offset=True)
    norm.head_rms_norm(x.view(16, 32, 128)[:, :24], weight[:128], 1e-5)
    activation.silu_and_mul(x)
    activation.silu_and_mul(x, scale)
    quantize.quantize_fp8(x, scale)
    quantize.quantize_fp8_per_token(x)
    for cache, interleaved, rotary in ((BF16, False, 128), (FLOAT8, False, 64), (FLOAT8, True, 128), (BF16, False, 0)):
        rotate(cache, interleaved, rotary)
    for dtype in (BF16, torch.float32):
        draw(dtype)


def rotate(cache_dtype: torch.dtype, interleaved: bool, rotary: int) -> None:
    q, k, v = torch.zeros(16, 12, 128, dtype=BF16).split([8, 2, 2], dim=1)
    caches = [torch.zeros(3, 2, 64, 128).to(cache_dtype) for _ in "kv"]
    table = torch.zeros(16, rotary // 2) if rotary else None
    scales = torch.ones(2) if cache_dtype is FLOAT8 else None
    slots = torch.zeros(16, dtype=torch.int64)
    rope_cache.rope_and_cache(q, k, v, table, table, rotary, interleaved, *caches, slots, scales)
    if scales is not None:
        rope_cache.rope_and_cache(q, k, v, table, table, rotary, interleaved, *caches, slots, scales, rotate_keys=True)


def draw(dtype: torch.dtype) -> None:
    logits, out = torch.zeros(2, 128256, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    real = [torch.zeros(2, dtype=torch.float64) for _ in range(3)]
    word = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    rows = sampling.SamplingRows(real[0], out, real[1], real[2], *word, slots=out, positions=out)
    sampling.sample(logits, out, vocab_size=128256, rows=rows)
    sampling.sample(logits, out, vocab_size=128256, greedy=True)
