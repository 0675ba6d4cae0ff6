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
from lamella_core.device import gpu_fingerprint


def environment(device: str) -> dict[str, Any]:
    """Returns machine, versions, commit and, for "cuda", the GPU; JSON-ready."""
    found: dict[str, Any] = {
        "machine": {**machine(), "torch_threads": torch.get_num_threads()},
        "versions": versions(),
        "commit": commit(),
        "gpu": None,
    }
    if device == "cuda":
        facts = gpu_fingerprint()
        found["gpu"] = {name: facts[name] for name in ("name", "capability", "memory_bytes")}
        found["versions"].update({name: facts[name] or None for name in ("cuda", "driver", "triton")})
        found["versions"]["flashinfer"] = _version("flashinfer-python")
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


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
