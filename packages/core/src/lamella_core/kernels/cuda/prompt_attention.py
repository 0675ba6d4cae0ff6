"""Causal attention of prompts on Hopper, in one kernel: ``prompt_attention.cu``.

Legend: T query tokens of S sequences, Hq query and Hkv key/value heads of D numbers; C keys of begun sequences, those
whose first tokens were computed before.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.kernels.cuda import driver

HEAD_DIMS = (64, 128)
_HALVES = (torch.bfloat16, torch.float16)
_FLOAT8 = torch.float8_e4m3fn
_TILE, _THREADS, _BOX_COLUMNS = 128, 384, 64  # as in the source
_TILES_IN_SHARED_MEMORY, _MARGIN = 5, 1024  # queries, keys twice and values twice; to begin at a multiple of it
_ALIGNMENT = 16  # bytes, of heads and tokens
_LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class BegunKeys:
    """All keys and values of the first sequences, one after another; this step's tokens have theirs among them.

    Attributes:
        k: [at least C, Hkv, D], in the queries' dtype.
        v: like k.
        lengths: [begun] int32, keys of each sequence; their sum is C.
        scales: [2] float32, what these keys and values are multiplied by; None: nothing.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    scales: Tensor | None = None


def serves(q: Tensor, num_kv_heads: int, quantizes: bool = False) -> bool:
    """Whether there is a kernel for queries [T, Hq, D] where they are, with or without float8 results.

    The first call for a dtype and head size compiles it.
    """
    if not q.is_cuda or q.dtype not in _HALVES or q.shape[2] not in HEAD_DIMS or q.shape[1] % num_kv_heads:
        return False
    return _processors(q.device.index) > 0 and _fits(q) and _kernel_for(q, quantizes) is not None


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    *,
    scale: float,
    begun: BegunKeys | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Returns each token's attention over the sequence's tokens up to it, [T, Hq, D]; None: not served.

    Nothing is read back from the device. Weights are rounded to the queries' dtype; results that a scale is given for
    are float8_e4m3fn, divided by it. Calls can be recorded in graphs; those recorded on one stream share memory with
    each other and with the stream's own, so that no two of them may run at once.

    Args:
        q: [T, Hq, D], packed: sequence i has the rows ``query_start[i]`` to ``query_start[i + 1]``. Rows before the
            first or from the last on are left as they are in ``out``.
        k: [T, Hkv, D] of q's dtype, of the same tokens. Not read of begun sequences.
        v: like k.
        query_start: [S + 1] int32, not falling.
        scale: of products of queries and keys; positive.
        begun: keys and values of sequences that have more than these; None: there are none.
        out_scale: [] float32.
        out: for the result; not served unless it is contiguous and of the result's dtype and shape.

    Raises:
        RuntimeError: the call is recorded in a graph and is the first one on its stream.
    """
    keys = (k, v) if begun is None else (k, v, begun.k, begun.v)
    if not serves(q, k.shape[1], out_scale is not None) or not all(x.dtype == q.dtype and _fits(x) for x in keys):
        return None
    kernel = _kernel_for(q, out_scale is not None)
    out_dtype = q.dtype if out_scale is None else _FLOAT8
    if out is None:
        out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    if kernel is None or out.dtype != out_dtype or out.shape != q.shape or not out.is_contiguous():
        return None
    num_tokens, heads, _ = q.shape
    num_seqs, device = query_start.shape[0] - 1, q.device.index
    num_tiles = num_tokens // _TILE + num_seqs  # enough wherever sequences begin
    if num_seqs <= 0 or not num_tokens:
        return out
    lengths, kv_scales = (None, None) if begun is None else (begun.lengths, begun.scales)
    counters = _counters(device, torch._C._cuda_getCurrentRawStream(device))
    params = b"".join(_map(x) for x in (q, *keys, *((k, v) if begun is None else ()))) + struct.pack(
        "6Qf5i", *driver.addresses(out, query_start, lengths, kv_scales, out_scale, counters), scale * _LOG2E,
        num_seqs, 0 if lengths is None else lengths.shape[0], heads, heads // k.shape[1], num_tiles,
    )  # fmt: skip
    kernel.launch(min(_processors(device), num_tiles * heads), params, device)
    return out


@functools.cache
def _processors(device: int) -> int:
    """Returns how many multiprocessors a GPU has that have the kernel's instructions."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) if (properties.major, properties.minor) == driver.HOPPER else 0


@functools.cache
def _counters(device: int, stream: int) -> Tensor:
    """Returns zeros that launches on one stream use one after another, and leave zero.

    Raises:
        RuntimeError: these would be a graph's, and zero only after its first replay.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("prompt_attention is called first in a recording; call it before on the stream that records")
    return torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", device))


def _kernel_for(q: Tensor, quantizes: bool) -> driver.Kernel | None:
    return _kernel(q.shape[2], q.dtype == torch.bfloat16, quantizes, q.device.index)


@functools.cache
def _kernel(dim: int, is_bfloat16: bool, quantizes: bool, device: int) -> driver.Kernel | None:
    """Returns the kernel for a GPU; None where it cannot be compiled or loaded."""
    macros = {"DIM": dim, "BFLOAT16": is_bfloat16, "OUT_FLOAT8": quantizes}
    return driver.load(
        "prompt_attention", macros, threads=_THREADS, device=device,
        shared_memory=_TILES_IN_SHARED_MEMORY * _TILE * dim * 2 + _MARGIN,
        otherwise="attention of prompts goes to another kernel",
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int]:
    """Returns the bytes from a head to the next, and from a token to the next."""
    _, heads, dim = x.shape
    size = x.element_size()
    head = x.stride(1) * size if heads > 1 else dim * size  # of one alone any stride will do
    return head, x.stride(0) * size if x.shape[0] > 1 else heads * head


def _fits(x: Tensor) -> bool:
    """Whether copies can find tiles of a tensor [*, heads, D]."""
    places = (x.data_ptr(), *_strides(x))
    return x.stride(2) == 1 and all(place > 0 and place % _ALIGNMENT == 0 for place in places)


def _map(x: Tensor) -> bytes:
    tokens, heads, dim = x.shape
    return driver.tensor_map(x.data_ptr(), x.dtype, (dim, heads, tokens), _strides(x), (_BOX_COLUMNS, 1, _TILE))
