"""What a number was measured on: the GPU, the versions that matter for speed, and the commit of a checkout."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lamella
from lamella.cli.machine import machine, peak_memory_bytes, versions

_GPU_PACKAGES = {"triton": "triton", "flashinfer": "flashinfer-python"}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def environment(device: str) -> dict[str, Any]:
    """Returns machine, versions, commit and, for "cuda", the GPU; JSON-ready."""
    found: dict[str, Any] = {
        "machine": {**machine(), "torch_threads": torch.get_num_threads()},
        "versions": versions(),
        "commit": commit(),
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
        found["versions"].update(gpu_versions())
    return found


def gpu_versions() -> dict[str, str | None]:
    """Returns the versions of CUDA, driver, Triton and FlashInfer; None: not there, or not known."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda, "driver": driver_version()}
    for name, distribution in _GPU_PACKAGES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = None
    return found


def driver_version() -> str | None:
    """Returns the version of the NVIDIA driver, as the kernel module or else nvidia-smi tells it."""
    try:
        words = _DRIVER_FILE.read_text(encoding="ascii", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        words = []
    numbers = [word for word in words if word.replace(".", "").isdigit() and "." in word]
    if numbers:
        return numbers[0]
    asked = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return asked.splitlines()[0].strip() if asked else None


def commit() -> str | None:
    """Returns the commit that this code was checked out from, "+" appended if files differ; None outside a checkout."""
    folder = str(Path(lamella.__file__).parent)
    found = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    if not found:
        return None
    tracked = _output("git", "-C", folder, "ls-files", "--error-unmatch", "__init__.py")
    if not tracked:  # installed below somebody else's checkout
        return None
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no", ":/")
    return found.strip() + ("+" if changed else "")


def peak_memory(device: str) -> dict[str, int | None]:
    """Returns the largest bytes that this process held: resident on the host, and reserved on the GPU by torch."""
    on_gpu = torch.cuda.max_memory_reserved() if device == "cuda" else None
    return {"peak_memory_bytes": peak_memory_bytes(), "peak_gpu_memory_bytes": on_gpu}


def _output(program: str, *arguments: str) -> str | None:
    """Returns what a program prints; None if it is missing, fails or takes ten seconds."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
