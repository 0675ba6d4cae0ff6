"""Which device a model runs on: the CPU, or an NVIDIA GPU that can run it."""

from __future__ import annotations

import logging

import torch

from lamella_core.errors import ConfigError

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 matrix units


def resolve_device(name: str) -> str:
    """Returns "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises:
        ConfigError: "cuda" on a machine that has no GPU which can run models; the message says why.
    """
    if name == "cpu":
        return "cpu"
    reason = why_no_cuda()
    if reason is None:
        return "cuda"
    if name == "cuda":
        raise ConfigError(f"device is 'cuda', but {reason}; use device='cpu' or 'auto'")
    if torch.cuda.is_available():
        logger.warning("running on the CPU: %s", reason)
    return "cpu"


def why_no_cuda() -> str | None:
    """Returns why models cannot run on a GPU of this machine; None if they can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU (driver missing, or CUDA_VISIBLE_DEVICES hides it)"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        need = ".".join(map(str, LEAST_CAPABILITY))
        have = ".".join(map(str, capability))
        return f"{torch.cuda.get_device_name()} has compute capability {have}; {need} is the least"
    return None
