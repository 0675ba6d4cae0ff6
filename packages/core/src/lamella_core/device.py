"""Which device a model runs on: the CPU, or an NVIDIA GPU that can run it."""

from __future__ import annotations

import functools
import logging
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def free_gpu_bytes() -> tuple[int, int]:
    """Returns what this process may still use of the current GPU's memory, and all of it.

    Memory that torch keeps for later tensors counts as free.
    """
    free, total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total


def gpu_fingerprint() -> dict[str, Any]:
    """What timings depend on: recorded in engines, name and capability compared on load. JSON-simple.

    Keys: name, capability ("9.0"), memory_bytes, driver, cuda (that torch was built for), torch, triton (versions).
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": _driver_version(),
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


@functools.cache
def _driver_version() -> str:
    """Returns the version of NVIDIA's kernel module, "" where the system does not tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    found = re.search(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)?)", text)
    return found[1] if found else ""


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
