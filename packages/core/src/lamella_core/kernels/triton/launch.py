"""What every kernel's launch has in common: the device's abilities, and programmatic dependent launch (PDL).

Under PDL a kernel may start while the one before it in the stream still runs, and hides its launch behind it. A kernel
with the constexpr ``USE_PDL`` therefore

* may read constants (weights, tables) first, then calls ``gdc_wait()`` before it reads another kernel's output and
  before it writes anything: the wait ends when all kernels before it are complete and their writes are visible;
* calls ``gdc_launch_dependents()`` as early as it likes, which lets the next kernel start; what the next one may read
  is governed by that one's wait alone.

Every kernel of a chain launched with PDL must wait, or a later one could overtake an earlier one. See the PTX manual,
"griddepcontrol".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

PDL_CAPABILITY = (9, 0)  # Hopper
FLOAT8_CAPABILITY = (8, 9)  # Ada: instructions that convert to float8
FLOAT8_MAX = 448.0  # largest finite float8_e4m3fn


@functools.cache
def is_interpreted() -> bool:
    """Whether kernels run in triton's interpreter (``TRITON_INTERPRET=1``), which takes CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _capability() -> tuple[int, int]:
    return (0, 0) if is_interpreted() else torch.cuda.get_device_capability()


@functools.cache
def use_pdl() -> bool:
    """Whether the current device has programmatic dependent launch: the value of a kernel's ``USE_PDL``."""
    return _capability() >= PDL_CAPABILITY


@functools.cache
def has_float8() -> bool:
    """Whether the current device converts to and from float8 itself; if not, kernels do it with integers.

    False in the interpreter, whose own conversion does not round to nearest.
    """
    return _capability() >= FLOAT8_CAPABILITY


@functools.cache
def has_wgmma() -> bool:
    """Whether four warps multiply together, out of shared memory: on Hopper, and nowhere else."""
    return _capability()[0] == PDL_CAPABILITY[0]


_NO_OPTIONS: dict[str, Any] = {}
_PDL_OPTIONS: dict[str, Any] = {"launch_pdl": True}


def launch_options(pdl: bool = True) -> dict[str, Any]:
    """Returns launch keywords of a kernel that waits as described above: ``kernel[grid](..., **launch_options())``."""
    return _PDL_OPTIONS if pdl and use_pdl() else _NO_OPTIONS


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def float8_storage(x: torch.Tensor) -> torch.Tensor:
    """Returns a float8_e4m3fn tensor as kernels take it: its bytes where the device knows no float8."""
    return x if has_float8() else x.view(torch.uint8)


@triton.jit
def fetch_lines(addresses):  # type: ignore[no-untyped-def]
    """Asks for the 128-byte lines at these addresses (int64) in the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )
