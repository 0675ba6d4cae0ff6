"""cuBLASLt's C functions, of the library that torch has loaded (see its documentation, "Using the cuBLASLt API").

An algorithm is 64 opaque bytes, which mean something to the same version of the library alone (`cublasLtMatmulAlgo_t`).
What an algorithm needs as workspace is allocated by torch for each call: on the current stream, and in a CUDA graph
that is recorded from the graph's own memory pool. So nothing is shared between streams, threads or graphs.

Legend: M rows, N output features, K input features. Matrices of the library are column-major: it computes
out^T [N, M] = w [N, K] times x^T [K, M].
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lamella_core.kernels.matmul import Scales

logger = logging.getLogger(__name__)

MOST_WORKSPACE = 32 << 20  # bytes that a proposed algorithm may need
ALGORITHM_BYTES = 64
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68  # of cudaDataType_t, cublasComputeType_t
DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
_TRANSPOSE_A, _SCALE_A, _SCALE_B, _FAST_ACCUMULATION = 3, 17, 18, 25  # of cublasLtMatmulDescAttributes_t
_PREFERRED_WORKSPACE, _PREFERRED_REDUCTIONS = 1, 3  # of cublasLtMatmulPreferenceAttributes_t
# Of cublasLtReductionScheme_t: partial sums over K are added in float32, in a fixed order, or there are none.
_REDUCTIONS = 2
_ONE, _ZERO = c_float(1), c_float(0)
_POINTER_BYTES = ctypes.sizeof(c_void_p)


class _Result(Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", c_uint64 * (ALGORITHM_BYTES // 8)),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


_HANDLE, _DESC, _LAYOUT, _BUFFER = c_void_p, c_void_p, c_void_p, c_void_p
_PROBLEM = (_HANDLE, _DESC, _LAYOUT, _LAYOUT, _LAYOUT, _LAYOUT)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (POINTER(_HANDLE),),
    "cublasLtMatmulDescCreate": (POINTER(_DESC), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (_DESC, c_int, _BUFFER, c_size_t),
    "cublasLtMatmulDescDestroy": (_DESC,),
    "cublasLtMatrixLayoutCreate": (POINTER(_LAYOUT), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (_LAYOUT,),
    "cublasLtMatmulPreferenceCreate": (POINTER(c_void_p),),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, _BUFFER, c_size_t),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulAlgoGetHeuristic": (*_PROBLEM, c_void_p, c_int, POINTER(_Result), POINTER(c_int)),
    "cublasLtMatmulAlgoCheck": (*_PROBLEM, _BUFFER, POINTER(_Result)),
    "cublasLtMatmul": (
        _HANDLE, _DESC, _BUFFER, _BUFFER, _LAYOUT, _BUFFER, _LAYOUT, _BUFFER, _BUFFER, _LAYOUT, _BUFFER, _LAYOUT,
        _BUFFER, _BUFFER, c_size_t, c_void_p,
    ),
}  # fmt: skip


class Product(NamedTuple):
    """What an algorithm is proposed for and checked against: x [m, k] times w [n, k] transposed."""

    m: int
    n: int
    k: int
    dtype: torch.dtype  # of both operands
    out_dtype: torch.dtype


class Library:
    """cuBLASLt's functions, and a handle for each GPU."""

    alignment = 256  # bytes; the library proposes for operands that are aligned so
    device = "cuda"

    def __init__(self, loaded: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, c_int
        loaded.cublasLtGetVersion.argtypes, loaded.cublasLtGetVersion.restype = (), c_size_t
        self.functions = loaded
        self.version = int(loaded.cublasLtGetVersion())
        self._handles: dict[int, c_void_p] = {}
        self._scales: dict[int, Tensor] = {}  # [], in place of a float8 product's own until it runs
        self._lock = threading.Lock()

    def is_ready(self) -> bool:
        """Whether the current GPU can be used. The first call makes its handle, so not while a graph is recorded."""
        try:
            self.handle()
        except RuntimeError as error:
            logger.warning("the default matmul kernels serve: %s", error)
            return False
        return True

    def handle(self) -> c_void_p:
        """Returns the current GPU's handle, which any number of threads may use at once."""
        device = torch.cuda.current_device()
        with self._lock:
            if device not in self._handles:
                self._scales[device] = torch.ones((), device=self.device)
                handle = c_void_p()
                _check("cublasLtCreate", self.functions.cublasLtCreate(byref(handle)))
                self._handles[device] = handle
            return self._handles[device]

    def _described(self, product: Product) -> tuple[c_void_p, _Described]:
        handle = self.handle()
        return handle, _Described(self.functions, product, self._scales[torch.cuda.current_device()].data_ptr())

    def proposals(self, product: Product, most: int) -> list[bytes]:
        """Returns up to ``most`` algorithms from the one expected to be the fastest on; none where nothing serves.

        All give the same bits whenever they run: none adds up in the order in which parts happen to be done.
        """
        (handle, described), preference = self._described(product), c_void_p()
        _check("cublasLtMatmulPreferenceCreate", self.functions.cublasLtMatmulPreferenceCreate(byref(preference)))
        results, found = (_Result * most)(), c_int()
        try:
            for attribute, value in (
                (_PREFERRED_WORKSPACE, c_size_t(MOST_WORKSPACE)), (_PREFERRED_REDUCTIONS, ctypes.c_uint32(_REDUCTIONS)),
            ):  # fmt: skip
                _check("cublasLtMatmulPreferenceSetAttribute", self.functions.cublasLtMatmulPreferenceSetAttribute(
                    preference, attribute, byref(value), ctypes.sizeof(value)))  # fmt: skip
            status = self.functions.cublasLtMatmulAlgoGetHeuristic(
                handle, *described.parts, preference, most, results, byref(found)
            )
        finally:
            self.functions.cublasLtMatmulPreferenceDestroy(preference)
        return [bytes(result.algorithm) for result in results[: 0 if status else found.value] if result.state == 0]

    def prepare(self, algorithm: bytes, product: Product) -> Prepared | None:
        """Returns the product by an algorithm, ready to run on the current GPU; None if that does not serve it."""
        (handle, described), checked = self._described(product), _Result()
        status = self.functions.cublasLtMatmulAlgoCheck(handle, *described.parts, algorithm, byref(checked))
        if status or checked.state or checked.workspace_bytes > MOST_WORKSPACE:
            return None
        return Prepared(self.functions, handle, described, product, algorithm, checked.workspace_bytes)


class _Described:
    """A product in the library's descriptors, which live as long as this.

    ``parts`` are the operation and the layouts of w, x, the summand (the result's) and the result. ``scale`` is where a
    float8 product finds both its scales: what is proposed depends on whether there are any.
    """

    def __init__(self, functions: ctypes.CDLL, product: Product, scale: int) -> None:
        self._functions = functions
        self.operation, self._layouts = c_void_p(), [c_void_p() for _ in range(3)]
        m, n, k, dtype, out_dtype = product
        _check("cublasLtMatmulDescCreate", functions.cublasLtMatmulDescCreate(
            byref(self.operation), _COMPUTE_FLOAT32, _FLOAT32))  # fmt: skip
        self.set_attribute(_TRANSPOSE_A, c_int(1))
        if dtype == torch.float8_e4m3fn:
            self.set_attribute(_FAST_ACCUMULATION, ctypes.c_int8(1))
            self.set_attribute(_SCALE_A, c_void_p(scale))
            self.set_attribute(_SCALE_B, c_void_p(scale))
        sizes = ((dtype, k, n), (dtype, k, m), (out_dtype, n, m))
        for layout, (kind, rows, columns) in zip(self._layouts, sizes, strict=True):
            _check("cublasLtMatrixLayoutCreate", functions.cublasLtMatrixLayoutCreate(
                byref(layout), DATA_TYPES[kind], rows, columns, rows))  # fmt: skip
        w, x, out = self._layouts
        self.parts = (self.operation, w, x, out, out)

    def set_attribute(self, attribute: int, value: Any) -> None:
        """Sets an attribute of the operation to a ctypes value."""
        _check("cublasLtMatmulDescSetAttribute", self._functions.cublasLtMatmulDescSetAttribute(
            self.operation, attribute, byref(value), ctypes.sizeof(value)))  # fmt: skip

    def __del__(self) -> None:
        for layout in self._layouts:
            if layout:
                self._functions.cublasLtMatrixLayoutDestroy(layout)
        if self.operation:
            self._functions.cublasLtMatmulDescDestroy(self.operation)


class Prepared:
    """A product by an algorithm, checked to serve it; threads and streams may run it at the same time."""

    def __init__(
        self,
        functions: ctypes.CDLL,
        handle: c_void_p,
        described: _Described,
        product: Product,
        algorithm: bytes,
        workspace_bytes: int,
    ) -> None:
        self._matmul, self._set_attribute = functions.cublasLtMatmul, functions.cublasLtMatmulDescSetAttribute
        self._handle, self._described = handle, described
        self._shape, self._out_dtype = (product.m, product.n), product.out_dtype
        self._algorithm, self._workspace_bytes = algorithm, workspace_bytes
        self._w_scale, self._x_scale = c_void_p(), c_void_p()
        self._lock = threading.Lock()  # the operation holds the scales' addresses from when they are set to the launch

    def run(self, x: Tensor, w: Tensor, scales: Scales | None, summand: Tensor | None = None) -> Tensor:
        """Returns x [m, k] times w [n, k] transposed: [m, n] on the current stream; float8 with scales [].

        A summand [m, n] of the result's dtype is added before the result is rounded.
        """
        out = torch.empty(self._shape, dtype=self._out_dtype, device=x.device)
        size = self._workspace_bytes
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)  # a tenth of the time of `current_stream`
        operation, w_layout, x_layout, out_layout, _ = self._described.parts
        out_at = out.data_ptr()
        summand_at, factor = (out_at, _ZERO) if summand is None else (summand.data_ptr(), _ONE)
        with self._lock:
            if scales is not None:
                self._w_scale.value, self._x_scale.value = scales.w.data_ptr(), scales.x.data_ptr()
                status = self._set_attribute(operation, _SCALE_A, byref(self._w_scale), _POINTER_BYTES)
                status = status or self._set_attribute(operation, _SCALE_B, byref(self._x_scale), _POINTER_BYTES)
                _check("cublasLtMatmulDescSetAttribute", status)
            status = self._matmul(
                self._handle, operation, byref(_ONE), w.data_ptr(), w_layout, x.data_ptr(), x_layout, byref(factor),
                summand_at, out_layout, out_at, out_layout, self._algorithm,
                None if workspace is None else workspace.data_ptr(), size, stream,
            )  # fmt: skip
        _check("cublasLtMatmul", status)
        return out


def _check(what: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{what} failed: cublasStatus_t {status}")


@functools.cache
def library() -> Library | None:
    """Returns the cuBLASLt that torch has loaded; None where there is none, or no GPU."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    try:
        return Library(ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"))
    except (OSError, AttributeError) as error:  # not there, or without a function that is needed
        logger.info("cuBLASLt cannot be called, torch chooses its algorithms: %s", error)
        return None
