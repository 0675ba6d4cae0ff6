"""What both attention kernels do: find keys through block tables, widen float8, and keep a running softmax.

Scores are in base 2 (exp2 is one instruction): a score times log2(e). Masked scores are -inf; a running maximum starts
at the finite `LOWEST`, so that no row, however masked, computes inf - inf. The running softmax is that of Milakov and
Gimelshein (2018), as used by FlashAttention (Dao et al. 2022).

A float8 cache is widened to fp16, which holds every float8_e4m3fn value and to which one instruction converts; queries
are then fp16 as well, saturated (float32 queries stay float32).

Both functions compute what `reference.paged_attention` does, and take

* q in float32, bfloat16 or float16;
* k_cache, v_cache [N, Hkv, P, D] in q's dtype or float8_e4m3fn, with equal strides; P a power of two;
* block_tables [*, B] int32, of which sequence i has row ``table_rows[i]`` (int32): the cache blocks of its tokens,
  negative where evicted behind the window;
* scale: multiplies products of queries and keys; positive;
* sliding_window: a query sees so many last keys, its own included (0: all), and beside them the first ``num_sinks``;
* is_chunked: keys are cut into chunks of ``sliding_window``, and a query sees its own chunk instead;
* sparsity: which of these keys each head sees, see `BlockSparsity`;
* softcap: scores become softcap * tanh(scores / softcap); 0: they stay;
* alibi_slopes [Hq] float32: times the key's position less the query's added to scores;
* rounds_alibi: scale * bfloat16(slope * bfloat16(key's position)) is added instead;
* sink_logits [Hq]: one more softmax column per head, without a value;
* kv_scales [2] float32: what cached keys and values are multiplied by;
* out_scale [] float32: the result is then float8_e4m3fn, divided by it;
* out: a contiguous tensor for the result, which is also returned.

They raise ConfigError where tensors do not fit each other or the kernel, or a workspace is too small.

Shape legend: T query tokens, S sequences, Hq query and Hkv key/value heads, G = Hq / Hkv heads that share keys, D head
size, N cache blocks of P tokens, B longest block table; M rows of a tile (heads of a group times queries), K its keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_core.errors import ConfigError
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_core.kernels.triton.launch import float8_storage, has_float8, is_interpreted, next_power_of_2
from lamella_core.kernels.triton.quantize import to_scaled_float8

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # below every score
# Small tensors that may be slices: their addresses shall not choose between compiled kernels.
UNALIGNED = [
    "rows_ptr", "starts_ptr", "lengths_ptr", "prefixes_ptr", "alibi_ptr", "sinks_ptr", "kv_scales_ptr", "out_scale_ptr",
]  # fmt: skip
FLOAT8 = torch.float8_e4m3fn
_PRODUCTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_LEAST_COLUMNS = 16  # of a head, padded: what a matrix unit takes


@dataclass(frozen=True)
class Layout:
    """What a kernel is compiled for, beside its tile: the layer, and where things lie. Strides in elements."""

    heads: int  # Hq
    group: int  # G
    head_dim: int  # D
    padded_dim: int  # the next power of two
    page: int  # P; 0: keys and values are not in a cache, but [T, Hkv, D] beside the queries
    q_token_stride: int
    q_head_stride: int
    block_stride: int  # of the caches
    head_stride: int
    token_stride: int
    dtype: tl.dtype  # of products
    float8: bool  # the caches are
    native: bool  # the device converts float8 itself; if not, caches and results are uint8 to a kernel
    window: int  # 0: all keys
    chunked: bool  # a query sees its chunk of ``window`` keys rather than the last ones
    sinks: int  # first keys seen beside the window
    softcap: float  # 0: none
    sparse_block: int  # tokens; see `BlockSparsity`; 0: attention is not sparse
    local_blocks: int
    vert_stride: int
    first_offset: int  # by how many blocks the pattern of this rank's first head is moved
    head_step: int
    alibi_scale: float  # of rounded ALiBi, see `AttentionSpec.rounds_alibi`; 0: ALiBi goes by distance


# window, sinks, softcap, chunked, sparsity, rounded ALiBi
Mask = tuple[int, int, float, bool, BlockSparsity | None, bool]
_DENSE = BlockSparsity(0, 0, 1, 0)


@functools.lru_cache(maxsize=1024)
def _layout(
    q: tuple[int, ...], q_strides: tuple[int, ...], cache: tuple[int, ...], strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], same: bool, scale: float, mask: Mask,
) -> Layout:  # fmt: skip
    """Checks and makes a `Layout`: q is [Hq, D], strides go with shapes."""
    q_dtype, k_dtype, v_dtype = dtypes
    if q_dtype not in _PRODUCTS or k_dtype not in (q_dtype, FLOAT8):
        raise ConfigError(f"queries are {q_dtype}, cached keys {k_dtype}: keys must be float8_e4m3fn or as queries are")
    if k_dtype != v_dtype or not same:
        raise ConfigError("keys and values differ in dtype, shape or strides; make them alike")
    (heads, dim), (_, kv_heads, page, width) = q, cache
    if dim != width or heads % kv_heads or dim % 2:
        raise ConfigError(
            f"queries [*, {heads}, {dim}] do not fit a cache {list(cache)} [N, Hkv, P, D]; D must be even"
        )
    if strides[3] != 1 or q_strides[2] != 1:
        raise ConfigError("values of a head lie apart in the queries or the cache; they must be side by side")
    if scale <= 0.0:
        raise ConfigError(f"scale is {scale}; it must be positive")
    float8 = k_dtype == FLOAT8
    sparsity = mask[4] or _DENSE
    return Layout(
        heads=heads, group=heads // kv_heads, head_dim=dim,
        padded_dim=next_power_of_2(max(dim, _LEAST_COLUMNS * (1 + float8))), page=page,
        q_token_stride=q_strides[0], q_head_stride=q_strides[1],
        block_stride=strides[0], head_stride=strides[1], token_stride=strides[2],
        dtype=tl.float16 if float8 and q_dtype != torch.float32 else _PRODUCTS[q_dtype],
        float8=float8, native=has_float8(), window=mask[0], chunked=mask[3],
        sinks=mask[1] if mask[0] else 0, softcap=mask[2], sparse_block=sparsity.block_size,
        local_blocks=sparsity.num_local_blocks, vert_stride=sparsity.vert_stride,
        first_offset=sparsity.first_head * sparsity.head_step, head_step=sparsity.head_step,
        alibi_scale=scale if mask[5] else 0.0,
    )  # fmt: skip


def layout_of(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, sliding_window: int, num_sinks: int, softcap: float,
    is_chunked: bool = False, sparsity: BlockSparsity | None = None, rounds_alibi: bool = False,
) -> Layout:  # fmt: skip
    """Returns what a kernel is compiled for.

    Raises:
        ConfigError: the queries [*, Hq, D] and caches [N, Hkv, P, D] do not fit each other or the kernels.
    """
    strides = k_cache.stride()
    same = k_cache.shape == v_cache.shape and strides == v_cache.stride()
    dtypes = (q.dtype, k_cache.dtype, v_cache.dtype)
    mask = (sliding_window, num_sinks, softcap, is_chunked, sparsity, rounds_alibi)
    return _layout(tuple(q.shape[1:]), q.stride(), tuple(k_cache.shape), strides, dtypes, same, scale, mask)


def are_alike(k: Tensor, v: Tensor) -> bool:
    """Whether elements of two tensors lie in the same order and distances."""
    return k.shape == v.shape and all(n == 1 or a == b for n, a, b in zip(k.shape, k.stride(), v.stride()))


def ragged_layout_of(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sliding_window: int, num_sinks: int, softcap: float,
    is_chunked: bool = False, sparsity: BlockSparsity | None = None, rounds_alibi: bool = False,
) -> Layout:  # fmt: skip
    """Returns what a kernel is compiled for whose keys and values are [T, Hkv, D], of the queries' tokens.

    Raises:
        ConfigError: they do not fit each other or the kernels.
    """
    shapes, strides = ((1, k.shape[1], 0, k.shape[2]), (0, k.stride(1), k.stride(0), k.stride(2)))
    same = are_alike(k, v) and k.shape[0] == q.shape[0] and k.dtype == q.dtype
    mask = (sliding_window, num_sinks, softcap, is_chunked, sparsity, rounds_alibi)
    return _layout(tuple(q.shape[1:]), q.stride(), shapes, strides, (q.dtype, k.dtype, v.dtype), same, scale, mask)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter a small number, so that small tests split as large batches do."""
    return 4 if is_interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a GPU's shared memory that one program may have; in the interpreter an H100's."""
    if is_interpreted():
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def result_like(q: Tensor, out_scale: Tensor | None, out: Tensor | None) -> Tensor:
    """Returns ``out`` if there is one that fits, else a new tensor [T, Hq, D]: float8 if there is a scale for it.

    Raises:
        ConfigError: ``out`` has another shape or dtype, or is not contiguous.
    """
    dtype = q.dtype if out_scale is None else FLOAT8
    if out is None:
        return torch.empty(q.shape, dtype=dtype, device=q.device)
    if out.dtype != dtype or out.shape != q.shape or not out.is_contiguous():
        raise ConfigError(f"out is {out.dtype} {list(out.shape)}; it must be contiguous {dtype} {list(q.shape)}")
    return out


def storage(x: Tensor) -> Tensor:
    """Returns a tensor as kernels take it: float8 as its bytes where the device knows no float8."""
    return float8_storage(x) if x.dtype == FLOAT8 else x


@triton.jit
def scales_of(kv_scales_ptr, scale):  # type: ignore[no-untyped-def]
    """Returns what products of queries and keys are multiplied by, and what results are."""
    factor, v_scale = scale, 1.0
    if kv_scales_ptr is not None:
        factor, v_scale = scale * tl.load(kv_scales_ptr), tl.load(kv_scales_ptr + 1)
    return factor, v_scale


@triton.jit
def head_cache(cache_ptr, kv_head, STEP: tl.constexpr, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns where one head's keys or values are, [N, P, D / STEP]; float8 as integers of STEP bytes."""
    if L.float8:
        if STEP == 2:
            cache_ptr = cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        else:
            cache_ptr = cache_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    return cache_ptr + kv_head * (L.head_stride // STEP)


@triton.jit
def oldest_key(position, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the first key in the window, or chunk, of a query at ``position``; below 0 it is the first of all."""
    if L.chunked:
        oldest = position // L.window * L.window
    else:
        oldest = position + 1 - L.window
    return oldest


@triton.jit
def in_pattern(positions, heads, keys, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns which keys [K] sparse heads [M] see of queries at ``positions`` [M] or []: [M, K]."""
    blocks = keys // L.sparse_block
    near = positions // L.sparse_block - L.local_blocks + 1
    moved = blocks[None, :] + (L.first_offset + 1 + heads * L.head_step)[:, None]
    return (blocks[None, :] >= (near + heads * 0)[:, None]) | (moved % L.vert_stride == 0)


@triton.jit
def first_visible_tile(position, L: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the tile that holds the first key in the window of a query at ``position``."""
    if L.window > 0:
        first = tl.maximum(oldest_key(position, L), 0) // BLOCK_N
    else:
        first = position * 0
    return first


@triton.jit
def load_pages(table_ptr, tile, last_page, L: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a tile's cache blocks: one id, or [BLOCK_N] ids where a tile spans several. Never reads past the last."""
    if L.page == 0:
        pages = tile * 0
    else:
        if BLOCK_N <= L.page:
            index = tile * BLOCK_N // L.page
        else:
            index = (tile * BLOCK_N + tl.arange(0, BLOCK_N)) // L.page
        pages = tl.load(table_ptr + tl.minimum(index, last_page))
    return pages


@triton.jit
def key_offsets(pages, tile, L: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns where in a head's cache [N, P, D] a tile's keys begin: [BLOCK_N, 1] int64, in units of STEP elements.

    An evicted block is read as block 0: in bounds, and to be masked. Without pages: where in [*, Hkv, D].
    """
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if L.page == 0:
        offsets = keys.to(tl.int64) * L.token_stride
    else:
        base = tl.maximum(pages, 0).to(tl.int64) * (L.block_stride // STEP)
        offsets = base + keys % L.page * (L.token_stride // STEP)
    return offsets[:, None]


@triton.jit
def widen_float8(codes, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the float8_e4m3fn values (finite ones only unless native) of uint8 bit patterns in L.dtype, exactly."""
    if L.native:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # Exponent and mantissa moved under fp16's exponent: too small by 2**(15 - 7), also for subnormals.
        bits = codes.to(tl.uint16)
        value = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return value.to(L.dtype)


@triton.jit
def widen_pairs(words, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the even and the odd float8_e4m3fn values of int16 words of two, each in the words' shape."""
    if L.native:  # two words at a time: one permutation of bytes, two conversions
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, $2, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        even, odd = even.to(L.dtype), odd.to(L.dtype)
    else:
        even = widen_float8((words & 0xFF).to(tl.uint8), L)
        odd = widen_float8(((words >> 8) & 0xFF).to(tl.uint8), L)
    return even, odd


@triton.jit
def narrow_query(q, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns q in the dtype of products; bf16 saturates in fp16."""
    if L.float8:
        if q.dtype == tl.bfloat16:
            q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0, tl.PropagateNan.ALL)
    return q.to(L.dtype)


@triton.jit
def _rounded(x):  # type: ignore[no-untyped-def]
    """Returns float32 numbers as bfloat16 holds them."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def shape_scores(  # type: ignore[no-untyped-def]
    dots,  # [M, K] products of queries and keys
    factor,  # what they are multiplied by
    keys,  # [K] positions
    distances,  # [M, K] or [1, K]: key's position less the query's
    slopes,  # [M] float32 ALiBi slopes, or None
    L: tl.constexpr,
):
    """Returns scores, soft-capped and biased by ALiBi, and the factor that still has to be applied for base 2."""
    rest = factor * LOG2E
    if L.softcap > 0.0:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        power = tl.exp2(dots * (rest * (2.0 / L.softcap)))
        dots = (L.softcap * LOG2E) * (1.0 - 2.0 / (power + 1.0))
        rest = rest * 0.0 + 1.0
    if slopes is not None:
        if L.alibi_scale > 0.0:
            bias = _rounded(slopes[:, None] * _rounded(keys.to(tl.float32))[None, :]) * (L.alibi_scale * LOG2E)
        else:
            bias = slopes[:, None] * LOG2E * distances.to(tl.float32)
        dots = dots * rest + bias
        rest = rest * 0.0 + 1.0
    return dots, rest


@triton.jit
def softmax_step(scores, factor, highest):  # type: ignore[no-untyped-def]
    """Advances a running softmax by a tile: [M, K] scores before ``factor``; [M] maximum so far.

    Returns weights [M, K], the new maximum [M], and by what earlier sums and results are multiplied [M].
    """
    now = tl.maximum(highest, tl.max(scores, axis=1) * factor)
    weights = tl.exp2(scores * factor - now[:, None])
    return weights, now, tl.exp2(highest - now)


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    acc,  # [M, D]
    highest,  # [M]
    total,  # [M]
    sink_ptrs,  # [M] where the rows' sink logits are, or None
    v_scale,
    out_scale,  # [] float32, or None
    L: tl.constexpr,
):
    """Ends a softmax; returns its results [M, D], as float8 divided by a scale if there is one. Blind rows are zero."""
    if sink_ptrs is not None:  # one more column, without a value
        sinks = tl.load(sink_ptrs).to(tl.float32) * LOG2E
        now = tl.maximum(highest, sinks)
        fade = tl.exp2(highest - now)
        total = total * fade + tl.exp2(sinks - now)
        acc = acc * fade[:, None]
    out = acc * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    if out_scale is not None:
        out = to_scaled_float8(out, out_scale, L.native)
    return out
