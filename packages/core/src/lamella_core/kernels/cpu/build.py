"""Compile the native CPU kernels on first use and load them; say why when that is not possible.

The C++ sources travel inside the wheel. They are compiled by the machine's own compiler for its own instruction set
into ``$LAMELLA_CACHE_DIR/kernels/<key>/`` (default ``~/.cache/lamella``), where the key covers sources, flags,
processor and compiler version. The library appears under its final name by an atomic rename, so concurrent processes
at worst compile twice. Nothing here runs at import and nothing raises: without a compiler the torch fallbacks serve.

Environment: ``LAMELLA_DISABLE_NATIVE=1`` forces the fallbacks, ``CXX`` names the compiler, ``LAMELLA_CACHE_DIR`` the
cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lamella_core.disk_cache import cache_root
from lamella_core.kernels.cpu.host import host

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent / "native"
LIBRARY_NAME = "lamella_kernels.so"
COMPILE_TIMEOUT_S = 300
_ONCE = threading.Lock()


@dataclass(frozen=True)
class NativeStatus:
    """Outcome of looking for the native kernels.

    Attributes:
        available: whether the native library is loaded and used.
        reason: why not, with a remedy; empty when available.
        path: the loaded library.
        compiler: command and version line of the compiler.
        flags: compile flags.
        digest: hash of sources, flags, processor and compiler; names the cache folder.
        openmp: the OpenMP runtime shared with torch, or "own" when the kernels bring a second one.
    """

    available: bool
    reason: str = ""
    path: str = ""
    compiler: str = ""
    flags: tuple[str, ...] = ()
    digest: str = ""
    openmp: str = ""


class _Unavailable(Exception):
    """Native kernels cannot be had; the message says why and what to do about it."""


@dataclass(frozen=True)
class _Toolchain:
    command: str
    version: str
    is_gcc: bool
    openmp_path: str  # torch's OpenMP runtime that the kernels bind to, or "" when they link their own

    @property
    def compile_flags(self) -> tuple[str, ...]:
        arm = platform.machine() in ("aarch64", "arm64")
        openmp = ("-Xpreprocessor", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
        target = "-mcpu=native" if arm else "-march=native"
        common = ("-std=c++17", "-O3", target, "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden")
        return (*common, *openmp)

    @property
    def link_flags(self) -> tuple[str, ...]:
        if sys.platform == "darwin":
            return ("-shared", "-undefined", "dynamic_lookup")
        return ("-shared",) if self.openmp_path else ("-shared", "-fopenmp")


def cache_dir() -> Path:
    """Folder of compiled kernels: ``$LAMELLA_CACHE_DIR/kernels``, by default ``~/.cache/lamella/kernels``."""
    return cache_root() / "kernels"


def loaded_openmp() -> str:
    """Path of the OpenMP runtime that torch brought into this process, or "" when it cannot be told."""
    names = ("libgomp", "libomp", "libiomp")
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                path = line.rstrip("\n").partition("/")[2]
                if path and os.path.basename(path).startswith(names):
                    return "/" + path
    except OSError:
        pass
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.dylib"))
    return str(bundled[0]) if bundled else ""


def _find_toolchain() -> _Toolchain:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in wanted:
        command = shutil.which(name)
        if command is None:
            continue
        try:
            shown = subprocess.run(
                [command, "--version"], capture_output=True, text=True, timeout=30, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        version = shown.splitlines()[0] if shown else command
        is_gcc = "Free Software Foundation" in shown
        runtime = loaded_openmp()
        # GCC code calls libgomp's entry points, Clang code libomp's: torch's runtime serves only the matching one.
        matches = is_gcc if "libgomp" in os.path.basename(runtime) else bool(runtime) and not is_gcc
        return _Toolchain(command, version, is_gcc, runtime if matches else "")
    raise _Unavailable(
        f"no working C++ compiler among {', '.join(wanted)}; install g++ (apt-get install g++) or set CXX to one"
    )


def _digest(sources: list[Path], toolchain: _Toolchain) -> str:
    sha = hashlib.sha256()
    for source in sources:
        sha.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    machine = host()
    for part in (toolchain.command, toolchain.version, machine.machine, machine.model, toolchain.openmp_path):
        sha.update(part.encode() + b"\0")
    sha.update(" ".join((*toolchain.compile_flags, *toolchain.link_flags, *machine.flags)).encode())
    return sha.hexdigest()[:24]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"compiler {command[0]} did not run: {error}") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise _Unavailable(
            f"{command[0]} failed with exit status {done.returncode}: {tail}; set CXX to another compiler"
        )


def _compile(sources: list[Path], toolchain: _Toolchain, target: Path) -> None:
    """Compile ``sources`` (one compiler process each) and put the library at ``target`` atomically."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            objects = [Path(folder) / (source.stem + ".o") for source in sources]
            commands = [
                [toolchain.command, *toolchain.compile_flags, "-c", str(source), "-o", str(obj)]
                for source, obj in zip(sources, objects)
            ]
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                list(pool.map(_run, commands))
            library = Path(folder) / LIBRARY_NAME
            _run([toolchain.command, *map(str, objects), *toolchain.link_flags, "-o", str(library)])
            os.replace(library, target)
    except OSError as error:
        raise _Unavailable(
            f"cannot write {target.parent} ({error}); set LAMELLA_CACHE_DIR to a writable folder"
        ) from error


def _load(path: Path, toolchain: _Toolchain, *, must: bool = False) -> ctypes.CDLL | None:
    """Load the library; one that is damaged gives None, or, when it ``must`` load, the reason as `_Unavailable`."""
    try:
        if toolchain.openmp_path:  # already in the process: this only makes its symbols visible to the kernels
            ctypes.CDLL(toolchain.openmp_path, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        if not must:
            return None
        raise _Unavailable(f"{path} does not load ({error}); set CXX to another compiler") from error


def _build_and_load() -> tuple[NativeStatus, ctypes.CDLL | None]:
    if os.environ.get("LAMELLA_DISABLE_NATIVE", "0") not in ("", "0"):
        raise _Unavailable("LAMELLA_DISABLE_NATIVE is set; unset it to use the native kernels")
    if sys.platform == "win32":
        raise _Unavailable("the native kernels need GCC or Clang on Linux or macOS; run under WSL2 to have them")
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    headers = sorted(SOURCE_DIR.glob("*.h"))
    if not sources:
        raise _Unavailable(f"no kernel sources in {SOURCE_DIR}; reinstall lamella-core")
    toolchain = _find_toolchain()
    digest = _digest(sources + headers, toolchain)
    path = cache_dir() / digest / LIBRARY_NAME
    library = _load(path, toolchain) if path.exists() else None
    if library is None:
        logger.info("compiling the CPU kernels with %s into %s (once per machine)", toolchain.command, path.parent)
        _compile(sources, toolchain, path)
        library = _load(path, toolchain, must=True)
    status = NativeStatus(
        available=True,
        path=str(path),
        compiler=f"{toolchain.command}: {toolchain.version}",
        flags=toolchain.compile_flags,
        digest=digest,
        openmp=toolchain.openmp_path or "own",
    )
    return status, library


@functools.lru_cache(maxsize=1)
def _outcome() -> tuple[NativeStatus, ctypes.CDLL | None]:
    try:
        return _build_and_load()
    except _Unavailable as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - a kernel build must never take the engine down; the fallbacks serve
        reason = f"unexpected {type(error).__name__}: {error}"
    if not reason.startswith("LAMELLA_DISABLE_NATIVE"):
        logger.warning("native CPU kernels are off, the slower torch fallbacks serve: %s", reason)
    return NativeStatus(available=False, reason=reason), None


def _native() -> tuple[NativeStatus, ctypes.CDLL | None]:
    with _ONCE:  # lru_cache alone would let two threads compile at the same time
        return _outcome()


def native_status() -> NativeStatus:
    """Compile and load the native kernels if that has not happened yet, and report the outcome. Never raises."""
    return _native()[0]


def native_library() -> ctypes.CDLL | None:
    """The loaded native library, or None when only the torch fallbacks serve."""
    return _native()[1]
