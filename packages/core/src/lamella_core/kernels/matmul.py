"""Matmul kernels and plans: what can multiply a weight, in which layout, and which kernel serves how many rows.

A weight is stored once, in one layout; a `MatmulPlan` names that layout and the kernel for each range of row counts M.
The builder times `candidate_plans` and records the winner's `to_dict` in the engine; `default_plan` serves when nothing
was timed or the processor differs from the recorded `cpu_fingerprint`. Further kernels and layouts join through
`register_kernel` and `register_layout`; algorithms of cuBLASLt need not, their names say all (`cublaslt`).

On the CPU, float32 always asks for batch-invariant kernels: a row's result has the same bits whatever it is computed
with. The native kernels guarantee that; the torch fallbacks come as near as they can, by products of one fixed shape.
CUDA kernels (`gpu_matmul`) make no such promise, and all read the layout "rows".
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella_core.errors import ConfigError, nearest_name
from lamella_core.kernels import cublaslt
from lamella_core.kernels.cpu import ops, reference
from lamella_core.kernels.cpu.build import native_status
from lamella_core.kernels.cpu.host import host
from lamella_core.kernels.fp8 import Fp8Upcast
from lamella_core.kernels.fused import FusedFunction
from lamella_core.kernels.gpu_matmul import GpuMatmul, gpu_kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
FEWEST_ROWS, FEW_ROWS = 4, 16  # a product of so few rows is bound by reading the weight, or nearly so


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors of a float8 product: (x * ``x``) times (w * ``w``) transposed, in ``out_dtype``."""

    x: Tensor  # float32, [] for all rows or [M, 1]
    w: Tensor  # float32, [] for all outputs or [N]
    out_dtype: torch.dtype


class MatmulKernel(Protocol):
    """A way to compute x [M, K] times w transposed, plus bias [N], for a weight w of N output features.

    Attributes:
        name: key in `KERNELS`, recorded in engines.
        layout: key in `LAYOUTS` of the weights it reads.
        batch_invariant: whether a float32 row's bits are meant to be independent of the rows computed with it.
        device: "cpu" or "cuda", of the tensors it takes.
    """

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> str: ...
    @property
    def batch_invariant(self) -> bool: ...
    @property
    def device(self) -> str: ...

    def available(self, dtype: torch.dtype, n: int, k: int) -> bool:
        """Whether this machine can run it for weights of this dtype and shape."""
        ...

    def __call__(self, x: Tensor, w: Tensor, n: int, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
        """Return [M, n] in x's dtype; float8 products come with ``scales``, which name the dtype."""
        ...


@dataclass(frozen=True)
class CpuMatmul:
    """A CPU kernel described by data."""

    name: str
    layout: str
    batch_invariant: bool
    dtypes: tuple[torch.dtype, ...]
    needs_native: bool
    function: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
    device: str = "cpu"

    def available(self, dtype: torch.dtype, n: int, k: int) -> bool:
        """Whether the dtype is served and, for native kernels, the library is loaded."""
        return dtype in self.dtypes and n > 0 and k > 0 and (not self.needs_native or native_status().available)

    def __call__(self, x: Tensor, w: Tensor, n: int, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
        """Return x [M, K] times w transposed plus bias: [M, n]."""
        return self.function(x, w, n, bias)


@dataclass(frozen=True)
class Layout:
    """How a weight [N, K] lies in memory. ``restore`` takes the stored tensor and N."""

    name: str
    arrange: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor, int], Tensor]


_DEVICE: ContextVar[str] = ContextVar("matmul_device", default="cpu")  # what plans are made for
KERNELS: dict[str, MatmulKernel] = {}
LAYOUTS: dict[str, Layout] = {}


def register_kernel(kernel: MatmulKernel) -> None:
    """Add a kernel. Its layout must be registered first.

    Raises:
        ConfigError: the name is taken or the layout unknown.
    """
    if kernel.name in KERNELS:
        raise ConfigError(f"matmul kernel {kernel.name!r} is registered already; choose another name")
    _known("layout", kernel.layout, LAYOUTS)
    KERNELS[kernel.name] = kernel


def register_layout(layout: Layout) -> None:
    """Add a weight layout.

    Raises:
        ConfigError: the name is taken.
    """
    if layout.name in LAYOUTS:
        raise ConfigError(f"weight layout {layout.name!r} is registered already; choose another name")
    LAYOUTS[layout.name] = layout


def _known(what: str, name: object, registry: Mapping[str, object]) -> str:
    if isinstance(name, str) and name in registry:
        return name
    raise ConfigError(
        f"unknown {what} {name!r}; known: {', '.join(sorted(registry))}{nearest_name(str(name), registry)}"
    )


def find_kernel(name: object) -> MatmulKernel:
    """Returns the kernel that an engine records as ``name``: one of `KERNELS`, or an algorithm of cuBLASLt.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(name, str) and name.startswith(cublaslt.PREFIX):
        return cublaslt.kernel_of(name)
    return KERNELS[_known("matmul kernel", name, KERNELS)]


def to_layout(w_rows: Tensor, layout: str) -> Tensor:
    """Arrange a row-major weight [N, K] in ``layout``."""
    return LAYOUTS[_known("layout", layout, LAYOUTS)].arrange(w_rows)


def from_layout(w: Tensor, layout: str, n: int) -> Tensor:
    """Give back the row-major weight [n, K] of a weight stored in ``layout``."""
    return LAYOUTS[_known("layout", layout, LAYOUTS)].restore(w, n)


@dataclass(frozen=True)
class MatmulPlan:
    """One weight layout and the kernel for each range of rows.

    Attributes:
        layout: key in `LAYOUTS`.
        steps: (largest M or None for no limit, name for `find_kernel`) with rising limits, the last one None.
    """

    layout: str
    steps: tuple[tuple[int | None, str], ...]

    def __post_init__(self) -> None:
        _known("layout", self.layout, LAYOUTS)
        limits = [limit for limit, _ in self.steps]
        whole = [limit for limit in limits[:-1] if type(limit) is int and limit > 0]
        if not limits or limits[-1] is not None or len(whole) != len(limits) - 1 or sorted(set(whole)) != whole:
            raise ConfigError(f"plan steps have row limits {limits}; need rising whole numbers > 0 and None last")
        for _, name in self.steps:
            kernel = find_kernel(name)
            if kernel.layout != self.layout:
                raise ConfigError(
                    f"matmul kernel {name!r} reads layout {kernel.layout!r}, the plan has {self.layout!r}"
                )
            if kernel.device != self.device:
                raise ConfigError(
                    f"matmul kernel {name!r} runs on {kernel.device}, others of the plan on {self.device}"
                )

    @property
    def batch_invariant(self) -> bool:
        """Whether a float32 row's bits never depend on the rows computed with it."""
        names = {name for _, name in self.steps}
        return len(names) == 1 and all(find_kernel(name).batch_invariant for name in names)

    @property
    def device(self) -> str:
        """Where its kernels run: "cpu" or "cuda"."""
        return find_kernel(self.steps[0][1]).device

    def available(self, dtype: torch.dtype, n: int, k: int) -> bool:
        """Whether this machine can run every step for this weight."""
        return all(find_kernel(name).available(dtype, n, k) for _, name in self.steps)

    def run(self, x: Tensor, w: Tensor, n: int, bias: Tensor | None = None, scales: Scales | None = None) -> Tensor:
        """Multiply x [M, K] by w (in this plan's layout) transposed, plus bias [n]: [M, n]; float8 with ``scales``."""
        return find_kernel(self.kernel_name(x.shape[0]))(x, w, n, bias, scales)

    def kernel_name(self, rows: int) -> str:
        """The name of what multiplies so many rows, for `find_kernel`."""
        for limit, name in self.steps:
            if limit is None or rows <= limit:
                return name
        raise ConfigError(f"plan {self.steps} has no step for {rows} rows")

    def fused(self, rows: int, n: int, step: type, is_plain: bool = True) -> FusedFunction | None:
        """The same product and a `kernels.fused.FusedStep` after it, where the kernel for so many rows offers that.

        Arguments are those of `lamella_core.kernels.fused.FusionOffer`.
        """
        kernel = find_kernel(self.kernel_name(rows))
        if not isinstance(kernel, (GpuMatmul, cublaslt.CublasLtMatmul)):
            return None
        return kernel.fused if kernel.offers is None or kernel.offers(rows, n, step, is_plain) else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: ``{"layout": str, "steps": [[max_m or null, kernel], ...]}``."""
        return {"layout": self.layout, "steps": [[limit, name] for limit, name in self.steps]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MatmulPlan:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: unknown keys, layout or kernel, or malformed steps.
        """
        if (
            not isinstance(data, Mapping)
            or set(data) != {"layout", "steps"}
            or not isinstance(data["steps"], (list, tuple))
        ):
            raise ConfigError(f"matmul plan is {data!r}; needs exactly the keys 'layout' and 'steps' (a list of pairs)")
        if not all(isinstance(step, (list, tuple)) and len(step) == 2 for step in data["steps"]):
            raise ConfigError(f"matmul plan steps are {data['steps']!r}; each must be a pair [max_m or null, kernel]")
        return cls(layout=data["layout"], steps=tuple((step[0], step[1]) for step in data["steps"]))


@contextmanager
def planning_for(device: str) -> Iterator[None]:
    """Layers that are made in the block get their default plans for "cpu" or "cuda"."""
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)


def candidate_plans(
    dtype: torch.dtype, n: int, k: int, *, require_batch_invariant: bool, device: str = "cpu"
) -> list[MatmulPlan]:
    """Plans worth timing on this machine for a weight [n, k]; never empty for the three float dtypes.

    Args:
        dtype: of the weight and the activations.
        n: output features.
        k: input features.
        require_batch_invariant: leave out what is not batch-invariant; always so for float32. Not on CUDA.
        device: "cpu" or "cuda", where the weight is.
    """
    if device == "cuda":
        return [plan for plan in _gpu_plans(dtype) if plan.available(dtype, n, k)]
    plans = [_single(kernel.name) for kernel in KERNELS.values() if kernel.device == device]
    for few in (FEWEST_ROWS, FEW_ROWS):
        for many in ("torch_rows", "torch_upcast"):
            plans.append(MatmulPlan("rows", ((few, "native_rows"), (None, many))))
    strict = require_batch_invariant or dtype == torch.float32
    unworthy = {_single("native_rows"), _single("torch_panels")} if native_status().available else set()
    if not strict:
        unworthy.add(_single("torch_tiled"))
    return [
        plan
        for plan in plans
        if plan.available(dtype, n, k) and plan not in unworthy and (plan.batch_invariant or not strict)
    ]


def default_plan(
    dtype: torch.dtype, n: int, k: int, *, batch_invariant: bool, layout: str | None = None, device: str | None = None
) -> MatmulPlan:
    """The plan when nothing was timed here, for weights that are (or will be) stored in ``layout``.

    Args:
        dtype: of the weight and the activations.
        n: output features.
        k: input features.
        batch_invariant: ask for batch invariance; always so for float32. Not on CUDA.
        layout: layout that the weight has already; None to choose one.
        device: "cpu" or "cuda", where the weight is; None: that of `planning_for`.

    Raises:
        ConfigError: no kernel on this machine reads that layout and dtype.
    """
    if layout is not None:
        _known("layout", layout, LAYOUTS)
    device = _DEVICE.get() if device is None else device
    strict = device == "cpu" and (batch_invariant or dtype == torch.float32)
    for plan in _gpu_plans(dtype) if device == "cuda" else _preference(strict):
        fits = layout is None or plan.layout == layout
        if fits and plan.available(dtype, n, k) and (plan.batch_invariant or not strict):
            return plan
    for kernel in KERNELS.values():
        fits = kernel.device == device == "cpu" and kernel.layout == layout
        if fits and kernel.available(dtype, n, k) and (kernel.batch_invariant or not strict):
            return _single(kernel.name)
    where = "GPU" if device == "cuda" else "CPU"
    raise ConfigError(
        f"no matmul kernel reads layout {layout!r} with {dtype} [{n}, {k}] on this {where}; rebuild the engine here"
    )


def _single(name: str) -> MatmulPlan:
    return MatmulPlan(KERNELS[name].layout, ((None, name),))


def _preference(strict: bool) -> list[MatmulPlan]:
    """Plans from the one usually fastest to the one always possible."""
    panels = [_single("native_panels")]
    if strict:
        return [*panels, _single("native_rows"), _single("torch_tiled"), _single("torch_panels"), _single("fp8_upcast")]
    rows = [
        MatmulPlan("rows", ((FEW_ROWS, "native_rows"), (None, "torch_rows"))),
        _single("torch_rows"),
    ]
    # With bfloat16 dot products in hardware, torch's library outruns float32 arithmetic when rows are many.
    first = [*rows, *panels] if host().has("avx512_bf16", "amx_bf16", "bf16") else [*panels, *rows]
    return [*first, _single("torch_panels"), _single("fp8_upcast")]


def _gpu_plans(dtype: torch.dtype) -> list[MatmulPlan]:
    """CUDA plans from the one usually fastest to the one always possible, which stops at float8."""
    libraries = ["cublas_fp8", "torch_fp8_upcast"] if dtype == torch.float8_e4m3fn else ["cublas"]
    few = [
        MatmulPlan("rows", ((rows, "triton_gemv"), (None, many)))
        for many in libraries
        for rows in (FEW_ROWS, FEWEST_ROWS, 1)
    ]
    return [*few, *map(_single, libraries)]


def cpu_fingerprint() -> dict[str, Any]:
    """What timings depend on: recorded in engines, compared on load. JSON-simple.

    Keys: machine, model, flags (digest), threads, native (kernel digest, or "" when off), torch (version).
    """
    machine = host()
    return {
        "machine": platform.machine(),
        "model": machine.model,
        "flags": machine.flags_digest,
        "threads": torch.get_num_threads(),
        "native": native_status().digest,
        "torch": torch.__version__,
    }


def _register_builtin() -> None:
    register_layout(Layout("rows", lambda w: w.contiguous(), lambda w, n: w[:n]))
    register_layout(Layout("panel16", ops.pack_panels, ops.unpack_panels))
    kernels: tuple[MatmulKernel, ...] = (
        CpuMatmul("native_panels", "panel16", True, FLOATS, True, ops.matmul_panels),
        CpuMatmul("native_rows", "rows", True, FLOATS, True, lambda x, w, n, bias: ops.gemv_rows(x, w, bias)),
        CpuMatmul("torch_rows", "rows", False, FLOATS, False, lambda x, w, n, bias: F.linear(x, w, bias)),
        CpuMatmul(
            "torch_upcast", "rows", False, HALVES, False, lambda x, w, n, bias: reference.linear_upcast(x, w, bias)
        ),
        CpuMatmul("torch_tiled", "rows", True, FLOATS, False, lambda x, w, n, bias: reference.linear_tiled(x, w, bias)),
        CpuMatmul("torch_panels", "panel16", True, FLOATS, False, reference.matmul_panels),
        Fp8Upcast(),
        *gpu_kernels(),
    )
    for kernel in kernels:
        register_kernel(kernel)


_register_builtin()
