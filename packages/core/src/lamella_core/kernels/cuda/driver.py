"""Compiling, loading and launching CUDA C++: NVRTC, which torch's CUDA wheels bring, and the driver, by ctypes.

Sources: "NVRTC" and "CUDA Driver API" of the CUDA toolkit's documentation.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import threading
from collections.abc import Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella_core import disk_cache

logger = logging.getLogger(__name__)

HOPPER = (9, 0)  # compute capability of the GPUs that the sources are for
_HOPPER_ARCHITECTURE = "sm_90a"
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of CUtensorMap
_MAP_TYPES = {torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}  # of CUtensorMapDataType; float8 as bytes
_SWIZZLE_128, _PROMOTE_256 = 3, 3  # of CUtensorMapSwizzle, CUtensorMapL2promotion
_MOST_SHARED_MEMORY = 8  # of CUfunction_attribute
_SUM_BYTES = 32  # of SHA-256
_MOST_MAPS = 8192  # that are kept: of weights, and of inputs for each number of rows and place

_DRIVER_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p),
    "cuTensorMapEncodeTiled": (
        c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32),
        *[c_int] * 4,
    ),
}  # fmt: skip
_NVRTC_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
}


@functools.cache
def _driver() -> ctypes.CDLL:
    return _with_signatures(ctypes.CDLL("libcuda.so.1"), _DRIVER_SIGNATURES)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = str(torch.version.cuda).split(".")[0]
    for path in Path(torch.__file__).parent.glob("lib/libcaffe2_nvrtc.so"):  # knows where torch's libnvrtc is
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path))
    return _with_signatures(ctypes.CDLL(f"libnvrtc.so.{major}"), _NVRTC_SIGNATURES)


def _with_signatures(loaded: ctypes.CDLL, signatures: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL:
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int
    return loaded


def _check(what: str, status: int) -> None:
    if status:
        name = c_char_p()
        _driver().cuGetErrorName(status, byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'unknown error').decode()} ({status})")


def compile_source(name: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """Returns the machine code of this package's source file ``name``.

    Args:
        name: such as "gated_product.cu".
        macros: defined for it, as whole numbers.
        architecture: such as "sm_90a".

    Raises:
        RuntimeError: it does not compile; the message holds the compiler's.
        OSError: there is no NVRTC of torch's version of CUDA.
        AttributeError: NVRTC lacks a function.
    """
    nvrtc, program = _nvrtc(), c_void_p()
    source = _source(name)
    status = nvrtc.nvrtcCreateProgram(byref(program), source, name.encode(), 0, None, None)
    if status:
        raise RuntimeError(f"nvrtcCreateProgram failed: nvrtcResult {status}")
    try:
        options = [
            f"--gpu-architecture={architecture}",
            "--std=c++17",
            f"--include-path={Path(__file__).parent}",
            *_definitions(macros),
        ]
        encoded = (c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            text = log.rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{name} does not compile for {architecture}: {text}")
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _source(name: str) -> bytes:
    return (resources.files(__package__) / name).read_bytes()


def _definitions(macros: Mapping[str, int]) -> list[str]:
    return [f"-D{key}={int(macros[key])}" for key in macros]


def kept_code(name: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """Returns what `compile_source` does, from the disk if it was compiled there before (`disk_cache`).

    The name of the file stands for sources, macros, architecture and compiler. The SHA-256 of the code precedes it in
    the file: the driver is not told where code ends, and would read on behind what is cut off.
    """
    major, minor = c_int(), c_int()
    _nvrtc().nvrtcVersion(byref(major), byref(minor))
    headers = [_source(path.name) for path in sorted(Path(__file__).parent.glob("*.h"))]
    compiler = f"{architecture} {major.value}.{minor.value} {torch.version.cuda}"
    key = disk_cache.digest(_source(name), *headers, *_definitions(macros), compiler)
    path = disk_cache.cache_root() / "kernels" / "cuda" / f"{Path(name).stem}-{key}.cubin"
    kept = disk_cache.read(path)
    if kept is not None and hashlib.sha256(kept[_SUM_BYTES:]).digest() == kept[:_SUM_BYTES]:
        return kept[_SUM_BYTES:]
    code = compile_source(name, macros, architecture)
    disk_cache.write(path, hashlib.sha256(code).digest() + code)
    return code


def _text(get_size: Any, get: Any, program: c_void_p) -> bytes:
    size = c_size_t()
    get_size(program, byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


class Kernel:
    """A function of a compiled source, loaded for the GPU that is current when it is made, and launched there."""

    def __init__(self, code: bytes, function: str, threads: int, shared_memory: int) -> None:
        """Loads machine code; not while a graph is recorded.

        Args:
            code: of `compile_source`.
            function: its name there.
            threads: of a block.
            shared_memory: bytes of it for a block.

        Raises:
            RuntimeError: the driver refuses.
        """
        driver, module, loaded = _driver(), c_void_p(), c_void_p()
        self._threads, self._shared_memory = threads, shared_memory
        _bind_thread()
        _check("cuModuleLoadData", driver.cuModuleLoadData(byref(module), code))
        _check("cuModuleGetFunction", driver.cuModuleGetFunction(byref(loaded), module, function.encode()))
        _check("cuFuncSetAttribute", driver.cuFuncSetAttribute(loaded, _MOST_SHARED_MEMORY, shared_memory))
        self._function, self._launch = loaded, driver.cuLaunchKernel

    def launch(self, blocks: int, params: bytes, device: int) -> None:
        """Runs so many blocks on the GPU's current stream with a kernel's one parameter, a struct."""
        _bind_thread()
        size = -(-len(params) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT  # a struct that holds maps has their alignment
        buffer = ctypes.create_string_buffer(params, size)
        stream = torch._C._cuda_getCurrentRawStream(device)  # a tenth of the time of `current_stream`
        arguments = (c_void_p * 1)(ctypes.addressof(buffer))
        status = self._launch(
            self._function, blocks, 1, 1, self._threads, 1, 1, self._shared_memory, stream, arguments, None
        )
        if status:
            _check("cuLaunchKernel", status)


def load(
    function: str, macros: Mapping[str, int], *, threads: int, shared_memory: int, device: int, otherwise: str
) -> Kernel | None:
    """Returns a kernel for Hopper from the source file of its name; None, and a warning, where that is not possible.

    Args:
        function: such as "gated_product", of "gated_product.cu".
        macros: as for `compile_source`.
        threads: as for `Kernel`.
        shared_memory: likewise.
        device: index of the GPU.
        otherwise: what happens without the kernel, for the warning.
    """
    try:
        code = kept_code(f"{function}.cu", macros, _HOPPER_ARCHITECTURE)
        with torch.cuda.device(device):
            return Kernel(code, function, threads, shared_memory)
    except (OSError, AttributeError, RuntimeError) as error:
        logger.warning("%s on GPU %d: %s", otherwise, device, error)
        return None


def addresses(*tensors: Tensor | None) -> list[int]:
    """Returns where tensors are, as a kernel's struct holds it; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


_thread = threading.local()


def _bind_thread() -> None:
    """Gives a thread that has not used the GPU yet the context that torch's calls get by themselves."""
    if not getattr(_thread, "is_bound", False):
        torch.cuda.set_device(torch.cuda.current_device())
        _thread.is_bound = True


@functools.lru_cache(maxsize=_MOST_MAPS)
def tensor_map(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> bytes:
    """Returns how copies find boxes of a tensor (CUtensorMap), swizzled in rows of 128 bytes; outside of it are zeros.

    Args:
        address: of its first number, a multiple of 16.
        dtype: bfloat16, float16 or float8_e4m3fn.
        sizes: numbers in each dimension, from the one that lies side by side on.
        strides: bytes from one to the next in each of the other dimensions, multiples of 16.
        box: numbers of a box in each dimension; in the first one 128 bytes.

    Raises:
        RuntimeError: the driver refuses.
    """
    _bind_thread()
    buffer = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    at = -(-ctypes.addressof(buffer) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    rank = len(sizes)
    status = _driver().cuTensorMapEncodeTiled(
        at, _MAP_TYPES[dtype], rank, address, (c_uint64 * rank)(*sizes), (c_uint64 * (rank - 1))(*strides),
        (c_uint32 * rank)(*box), (c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE_128, _PROMOTE_256, 0,
    )  # fmt: skip
    _check("cuTensorMapEncodeTiled", status)
    return ctypes.string_at(at, _MAP_BYTES)
