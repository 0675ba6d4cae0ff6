"""cuBLASLt's C functions on the CPU: called through ctypes as the library's own, products by torch.

An algorithm is eight 64-bit numbers: which it is, the most rows that it serves, the bytes of workspace that it needs.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

import pytest
import torch

from lamella_core.kernels import cublaslt, cublaslt_library, gpu_matmul

DTYPES = {2: torch.float16, 14: torch.bfloat16, 28: torch.float8_e4m3fn}
NOT_SUPPORTED = 15
_P = c_void_p
_TYPES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (POINTER(_P),),
    "cublasLtMatmulDescCreate": (POINTER(_P), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatmulDescDestroy": (_P,),
    "cublasLtMatrixLayoutCreate": (POINTER(_P), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (_P,),
    "cublasLtMatmulPreferenceCreate": (POINTER(_P),),
    "cublasLtMatmulPreferenceSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatmulPreferenceDestroy": (_P,),
    "cublasLtMatmulAlgoGetHeuristic": (_P, _P, _P, _P, _P, _P, _P, c_int, POINTER(cublaslt_library._Result),
                                       POINTER(c_int)),
    "cublasLtMatmulAlgoCheck": (_P, _P, _P, _P, _P, _P, POINTER(c_uint64), POINTER(cublaslt_library._Result)),
    "cublasLtMatmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, POINTER(c_uint64), _P, c_size_t, _P),
}  # fmt: skip


def algorithm(which: int, most_rows: int = 1 << 20, workspace_bytes: int = 0) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in (which, most_rows, workspace_bytes, 0, 0, 0, 0, 0))


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).view(shape)


class FakeCublasLt:
    """In place of the `ctypes.CDLL`. ``alive`` are descriptors and layouts, ``launched`` the algorithms that ran."""

    def __init__(self, version: int = 130100) -> None:
        self.algorithms = [algorithm(0), algorithm(1, workspace_bytes=4096), algorithm(2, most_rows=300)]
        self.alive: dict[int, Any] = {}
        self.preferred: dict[int, int] = {}
        self.launched: list[tuple[int, int]] = []  # algorithm, rows
        self.checks = 0
        self._next = 1
        self.cublasLtGetVersion = CFUNCTYPE(c_size_t)(lambda: version)
        for name, types in _TYPES.items():
            setattr(self, name, CFUNCTYPE(c_int, *types)(getattr(self, "_" + name.removeprefix("cublasLt"))))

    def _new(self, out: Any, value: Any) -> int:
        out[0] = self._next
        self.alive[self._next] = value
        self._next += 1
        return 0

    def _Create(self, out: Any) -> int:
        return self._new(out, "handle")

    def _MatmulDescCreate(self, out: Any, compute: int, scale: int) -> int:
        assert (compute, scale) == (68, 0)
        return self._new(out, {})

    def _MatmulDescSetAttribute(self, desc: int, attribute: int, value: int, size: int) -> int:
        self.alive[desc][attribute] = int.from_bytes(ctypes.string_at(value, size), "little")
        return 0

    def _MatrixLayoutCreate(self, out: Any, kind: int, rows: int, columns: int, leading: int) -> int:
        assert leading == rows
        return self._new(out, (DTYPES[kind], rows, columns))

    def _MatmulPreferenceCreate(self, out: Any) -> int:
        return self._new(out, "preference")

    def _MatmulPreferenceSetAttribute(self, preference: int, attribute: int, value: int, size: int) -> int:
        assert self.alive[preference] == "preference"
        self.preferred[attribute] = int.from_bytes(ctypes.string_at(value, size), "little")
        return 0

    def _destroy(self, made: int) -> int:
        del self.alive[made]
        return 0

    _MatmulDescDestroy = _MatrixLayoutDestroy = _MatmulPreferenceDestroy = _destroy

    def _MatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        most, results, found = arguments[-3:]
        operation = self.alive[arguments[1]]
        assert (25 in operation) == bool(operation.get(17)) == bool(operation.get(18))  # float8 has scales by now
        found[0] = min(most, len(self.algorithms))
        for index, numbers in enumerate(self.algorithms[:most]):
            ctypes.memmove(ctypes.byref(results[index].algorithm), numbers, 64)
        return 0

    def _MatmulAlgoCheck(self, handle: int, desc: int, a: int, b: int, c: int, d: int, chosen: Any, result: Any) -> int:
        self.checks += 1
        result[0].workspace_bytes = chosen[2]
        return NOT_SUPPORTED if self.alive[b][2] > chosen[1] else 0

    def _Matmul(
        self, handle: int, desc: int, alpha: int, w: int, w_layout: int, x: int, x_layout: int, beta: int, c: int,
        c_layout: int, out: int, out_layout: int, chosen: Any, workspace: int | None, size: int, stream: int | None,
    ) -> int:  # fmt: skip
        dtype, k, n = self.alive[w_layout]
        m, out_dtype = self.alive[x_layout][2], self.alive[out_layout][0]
        attributes = self.alive[desc]
        assert self.alive[handle] == "handle" and attributes[3] == 1 and self.alive[out_layout] == (out_dtype, n, m)
        assert size == chosen[2] and (workspace is None) == (size == 0)
        product = tensor_at(x, (m, k), dtype).double() @ tensor_at(w, (n, k), dtype).double().t()
        if dtype == torch.float8_e4m3fn:
            assert attributes[25] == 1
            product *= tensor_at(attributes[17], (), torch.float32) * tensor_at(attributes[18], (), torch.float32)
        factor = ctypes.c_float.from_address(beta).value
        assert (factor, c_layout) == ((0.0 if c == out else 1.0), out_layout)
        if factor:
            product += tensor_at(c, (m, n), out_dtype)
        tensor_at(out, (m, n), out_dtype).copy_(product)
        self.launched.append((chosen[0], m))
        return 0


def install(monkeypatch: pytest.MonkeyPatch, version: int = 130100) -> FakeCublasLt:
    """Makes the stand-in this machine's library, on a GPU that has all kernels."""
    fake = FakeCublasLt(version)
    loaded = cublaslt_library.Library(fake)  # type: ignore[arg-type]
    loaded.alignment, loaded.device = 1, "cpu"
    for module in (cublaslt, cublaslt_library):
        monkeypatch.setattr(module, "library", lambda: loaded)
    monkeypatch.setattr(gpu_matmul, "capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    return fake
