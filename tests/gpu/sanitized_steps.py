"""Runs a tiny model's engines through every kernel; started under compute-sanitizer by test_equalities."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.engines import engine_of, executor_of

from lamella_core.kernels.cuda.driver import HOPPER
from lamella_core.kernels.cuda.gated_product import gated_product
from lamella_core.kernels.cuda.prompt_attention import BegunKeys, prompt_attention
from lamella_core.kernels.fused import SiluGateAfter
from lamella_core.kernels.triton.attention.gather import gather_keys
from lamella_core.quantization.config import QuantConfig
from lamella_executor import SamplingParams

PROMPTS = [[5, 6, 7], [9], list(range(3, 43)), [11] * 17]
PARAMS = [
    SamplingParams(max_tokens=6, ignore_eos=True),
    SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.8, seed=1),
    SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=2),
    SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1),
]


def main(directory: Path) -> None:
    for quantization in (QuantConfig(), QuantConfig(quant_algo="FP8", kv_cache_quant_algo="FP8")):
        engine = engine_of(directory, "cuda", "bfloat16", load={"quant_config": quantization}, tokens_per_block=16)
        with executor_of(engine) as executor:
            for count in (len(PROMPTS), 1):
                executor.generate(PROMPTS[:count], PARAMS[:count])

    if torch.cuda.get_device_capability() == HOPPER:
        gate_many_rows()
        attend_long_prompts()


def gate_many_rows() -> None:
    """The tiny model's block is too narrow for this kernel; the most rows have pairs that are not halved."""
    weight = torch.randn(768, 80, device="cuda").bfloat16()
    for rows in (1, 129, 300, 6000):
        for scale in (None, torch.ones((), device="cuda")):
            assert gated_product(weight[:1].repeat(rows, 1), weight, None, None, SiluGateAfter(scale)) is not None
    torch.cuda.synchronize()


def attend_long_prompts() -> None:
    """The tiny model's heads are too small for this kernel; a begun prompt and whole ones, memory full to its end."""
    tables, contexts = torch.randperm(20, device="cuda").int()[None], torch.tensor([300], device="cuda").int()
    starts, rows = torch.tensor([0, 130, 131, 400], device="cuda").int(), torch.zeros_like(contexts)
    for dim in (64, 128):
        q, k, v = torch.randn(400, 8, dim, device="cuda").bfloat16().split([4, 2, 2], dim=1)
        caches = torch.randn(2, 20, 2, 16, dim, device="cuda").to(torch.float8_e4m3fn)
        memory = torch.empty(2, 300, 2, dim, dtype=torch.bfloat16, device="cuda").unbind()
        gather_keys(memory, q, *caches, tables, rows, contexts, max_context_len=300)
        for scale in (None, torch.ones((), device="cuda")):
            for begun in (None, BegunKeys(*memory, contexts, torch.ones(2, device="cuda"))):
                assert prompt_attention(q, k, v, starts, scale=0.1, begun=begun, out_scale=scale) is not None
    torch.cuda.synchronize()


main(Path(sys.argv[1]))
