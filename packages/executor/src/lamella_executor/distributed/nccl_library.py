"""NCCL's C functions, of the library that PyTorch has loaded (see NCCL's user guide, "NCCL API")."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p

import torch

from lamella_core.errors import CommunicationError

SUCCESS, IN_PROGRESS = 0, 7  # of ncclResult_t
SUM = 0  # of ncclRedOp_t
DATA_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
UNIQUE_ID_BYTES = 128
_UNDEFINED = -(2**31)
_MAGIC = 0xCAFEBEEF
_LEAST_VERSION = 21800  # of the structure below


class UniqueId(Structure):
    """ncclUniqueId: made by one rank, given to `ncclCommInitRankConfig` by all."""

    _fields_ = [("internal", c_char * UNIQUE_ID_BYTES)]


class Config(Structure):
    """ncclConfig_t as of NCCL 2.18; newer libraries take it by its size."""

    _fields_ = [
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cga_cluster_size", c_int),
        ("min_ctas", c_int),
        ("max_ctas", c_int),
        ("net_name", c_char_p),
        ("split_share", c_int),
    ]

    @classmethod
    def non_blocking(cls) -> Config:
        """Returns the defaults, but calls return `IN_PROGRESS` instead of waiting for other ranks."""
        return cls(
            ctypes.sizeof(cls), _MAGIC, _LEAST_VERSION, 0, _UNDEFINED, _UNDEFINED, _UNDEFINED, None, _UNDEFINED
        )  # fmt: skip


_BUFFER, _COMM, _STREAM = c_void_p, c_void_p, c_void_p
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ncclGetVersion": (POINTER(c_int),),
    "ncclGetUniqueId": (POINTER(UniqueId),),
    "ncclCommInitRankConfig": (POINTER(_COMM), c_int, UniqueId, c_int, POINTER(Config)),
    "ncclCommGetAsyncError": (_COMM, POINTER(c_int)),
    "ncclCommAbort": (_COMM,),
    "ncclAllReduce": (_BUFFER, _BUFFER, c_size_t, c_int, c_int, _COMM, _STREAM),
    "ncclAllGather": (_BUFFER, _BUFFER, c_size_t, c_int, _COMM, _STREAM),
    "ncclSend": (_BUFFER, c_size_t, c_int, c_int, _COMM, _STREAM),
    "ncclRecv": (_BUFFER, c_size_t, c_int, c_int, _COMM, _STREAM),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Returns NCCL.

    Raises:
        CommunicationError: there is none, or it is older than 2.18.
    """
    # Multicast over NVLink is left alone: sums would not have the same bits everywhere, and a program that ends in the
    # middle of one can take the host's switches out of service. NCCL reads this when it is first called.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    try:
        loaded = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise CommunicationError(f"several GPUs need NCCL, which CUDA builds of torch bring along: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int
    loaded.ncclGetErrorString.argtypes, loaded.ncclGetErrorString.restype = (c_int,), c_char_p
    version = c_int()
    loaded.ncclGetVersion(byref(version))
    if version.value < _LEAST_VERSION:
        raise CommunicationError(f"NCCL's version code is {version.value}; at least {_LEAST_VERSION} (2.18) is needed")
    return loaded


def check_result(what: str, result: int) -> None:
    """Raises CommunicationError unless an ncclResult_t is `SUCCESS` or `IN_PROGRESS`."""
    if result not in (SUCCESS, IN_PROGRESS):
        text = library().ncclGetErrorString(result).decode()
        raise CommunicationError(f"{what} failed: NCCL says {text!r} ({result}); NCCL_DEBUG=WARN tells more")
