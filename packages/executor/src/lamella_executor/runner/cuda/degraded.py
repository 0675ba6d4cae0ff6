"""What a GPU's compute capability makes an engine do in another way than it could, for the log of its start.

Each reason repeats a condition of the code that chooses: see the constants and functions named beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from lamella_core.kernels import ops
from lamella_core.kernels.cuda.driver import HOPPER
from lamella_core.kernels.cuda.gated_product import TILE_OUTPUTS
from lamella_core.kernels.cuda.prompt_attention import HEAD_DIMS
from lamella_core.kernels.gpu_matmul import FP8, FP8_CAPABILITY, HALVES
from lamella_core.layers.attention import Attention
from lamella_core.layers.linear import Linear
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.moe import GatedExperts
from lamella_executor.runner.cuda.ops import TritonOps
from lamella_executor.runner.cuda.runner import DeviceParts
from lamella_executor.runner.setup import RunnerSetup

logger = logging.getLogger(__name__)

Capability = tuple[int, int]


def log_degraded(setup: RunnerSetup, parts: DeviceParts) -> None:
    """Logs one line for each feature of the engine that its device has in a lesser form, and why."""
    for line in degraded(setup, parts, _capability(parts.device)):
        logger.info("degraded: %s", line)


def degraded(setup: RunnerSetup, parts: DeviceParts, capability: Capability | None) -> list[str]:
    """Returns what an engine does in a lesser way on a GPU of this capability, and why; None: it is not on a GPU."""
    if capability is None:
        return []
    has = f"this GPU has {_text(capability)}"
    lines = [f"{line}, and {has}" for line in _by_capability(setup, parts, capability)]
    if setup.model.config.torch_dtype == torch.float32:
        lines.append(
            "float32 weights are multiplied without TensorFloat-32, whatever the process allows: "
            "it would round what is multiplied to 10 bits"
        )
    return lines


def _by_capability(setup: RunnerSetup, parts: DeviceParts, capability: Capability) -> Iterator[str]:
    has_triton = isinstance(parts.ops, TritonOps)
    if capability < FP8_CAPABILITY:
        yield from _float8(setup, has_triton)
    if has_triton:
        from lamella_core.kernels.triton.launch import PDL_CAPABILITY

        if capability < PDL_CAPABILITY:  # `launch.use_pdl`
            yield (
                "kernels start when the one before has ended: programmatic dependent launch needs compute "
                f"capability {_text(PDL_CAPABILITY)}"
            )
        if capability[0] != HOPPER[0] and _sorts_experts(setup):  # `launch.has_wgmma`
            yield (
                "experts that many tokens meet read them where they are: products over sorted rows are for compute "
                f"capability {HOPPER[0]}.x"
            )
    if capability[0] != HOPPER[0] and parts.attention.name == "flashinfer" and setup.cache_dtype in HALVES:
        yield f"prompts go through FlashInfer's fa2: its fa3 is for compute capability {HOPPER[0]}.x"
    if capability != HOPPER and parts.attention.name == "triton" and _has_plain_prompts(setup):
        yield f"long prompts go through Triton's attention: our CUDA kernel is for compute capability {_text(HOPPER)}"
    if capability != HOPPER and any(_has_gate_in_product(module) for module in setup.model.modules()):
        yield (
            "gates of feed-forward blocks are kernels of their own after products of many rows: the CUDA kernel of "
            f"both is for compute capability {_text(HOPPER)}"
        )


def _float8(setup: RunnerSetup, has_triton: bool) -> Iterator[str]:
    """What GPUs without instructions and products of float8 do; see `gpu_matmul.upcast_fp8`, `launch.has_float8`."""
    layers = [module for module in setup.model.modules() if isinstance(module, Linear) and module.weight.dtype in FP8]
    need = f"need compute capability {_text(FP8_CAPABILITY)}"
    if any(layer.experts is None or not has_triton for layer in layers):
        yield (
            f"float8 weights are converted to {_name(setup.model.config.torch_dtype)} before each product, which saves "
            f"memory and costs time: float8 products {need}"
        )
    if any(layer.experts is not None and has_triton for layer in layers):
        yield f"float8 weights of experts are widened to float16 as they are multiplied: float8 products {need}"
    converted = [
        *(["activations"] if layers else []),
        *(["the KV cache"] if setup.cache_dtype in FP8 else []),
    ]
    if converted and has_triton:
        yield (
            f"our Triton kernels convert {' and '.join(converted)} to and from float8 with integer arithmetic: "
            f"instructions for it {need}"
        )


def _sorts_experts(setup: RunnerSetup) -> bool:
    from lamella_core.kernels.triton.moe_sorted import suits

    dtype = setup.model.config.torch_dtype
    stacks = (module.stack() for module in setup.model.modules() if isinstance(module, GatedExperts))
    return any(suits(dtype, stack) for stack in stacks)


def _has_plain_prompts(setup: RunnerSetup) -> bool:
    """Whether `HopperPrompts` would serve prompts of some layer."""
    from lamella_executor.attention.hopper_prompts import LEAST_PROMPT

    config, limits = setup.model.config, setup.limits
    if config.torch_dtype not in HALVES or config.prefix_rule is not None:
        return False
    if min(limits.max_num_tokens, limits.max_seq_len) < LEAST_PROMPT:
        return False
    return any(
        module.has_plain_scores
        and module.spec.head_dim in HEAD_DIMS
        and not setup.windows[module.spec.layer_idx].length
        for module in setup.model.modules()
        if isinstance(module, Attention)
    )


def _has_gate_in_product(module: torch.nn.Module) -> bool:
    """Whether `gated_product` would serve a module's first product."""
    if not isinstance(module, GatedMLP) or module.activation is not ops.silu_and_mul:
        return False
    layer = module.gate_up_proj
    if layer.bias is not None or layer.dtype not in HALVES or layer.out_features_local % (2 * TILE_OUTPUTS):
        return False
    return layer.weight.dtype not in FP8 or layer.weight_scale.numel() == 1


def _capability(device: torch.device) -> Capability | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _text(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
