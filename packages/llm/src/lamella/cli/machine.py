"""Facts about this machine and the installed versions, for reports."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

GIB = 1 << 30
PACKAGES = ("lamella", "lamella-core", "lamella-builder", "lamella-executor", "torch", "transformers", "tokenizers",
            "numpy")  # fmt: skip


def versions() -> dict[str, str | None]:
    """Returns package -> installed version (None: not installed), Python included."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported; does not import it."""
    return importlib.util.find_spec(module) is not None


def machine() -> dict[str, Any]:
    """Returns processor, usable cores, memory in bytes and operating system."""
    import psutil

    from lamella_core.kernels.cpu.host import host

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    interesting = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
    return {
        "cpu": host().model,
        "isa": [flag for flag in interesting if host().has(flag)],
        "usable_cores": cores,
        "memory_bytes": memory.total,
        "available_memory_bytes": memory.available,
        "os": f"{platform.system()} {platform.release()}",
    }


def peak_memory_bytes() -> int:
    """Returns the largest resident size that this process has had."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpus() -> list[dict[str, Any]]:
    """Returns name and memory of each CUDA device that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_bytes": p.total_memory} for p in properties]
