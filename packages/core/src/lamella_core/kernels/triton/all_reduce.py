"""Sums over GPUs that write into each other's memory, for messages too small for NCCL to be quick with.

Every 32-bit word of data travels with a 32-bit epoch in one 8-byte store, so a receiver knows each word by itself: no
flag follows the data and nothing is reset (the idea of NCCL's LL protocol). A kernel pushes its words into a slot of
every rank, its own too, and polls its own slots until the words of all ranks have come.

Slots belong to channels, one per program, and a channel counts its epochs. A channel has two slots for each source,
used in turn: who has received a rank's words of epoch e - 1 knows that this rank has read those of epoch e - 2, and may
write epoch e over them. Epochs live in device memory and advance inside the kernels, so launches may be replayed from
CUDA graphs. All ranks must launch the same kernels on tensors of the same shapes in the same order, and run the same
machine code: then their sums have equal bits. Sums are taken in float32 and rounded once.

A rank whose peer has died polls until the abort word, in host memory, is set; then the sums mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.launch import has_float8, launch_options, next_power_of_2, use_pdl
from lamella_core.kernels.triton.quantize import to_float8

CHANNELS = 128  # most programs of a launch: all of them run at once, one to a multiprocessor
SLOT_WORDS = 4096  # most words of one rank that a program handles at a time
_MOST_WORDS = 16384  # of all ranks in one program's registers
_LEAST_BLOCK = 256
_WORDS_PER_WARP = 256
_SPINS_PER_LOOK = tl.constexpr(256)  # polls between two looks at the abort word, which lies across PCIe
_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Peers:
    """The ranks' slots as one rank sees them.

    Attributes:
        rank: index of this one.
        size: number of ranks.
        table: [size + 1] int64 on the device: where each rank's slots lie (`slots_bytes`, zero at first, at a multiple
            of 16), then where the abort word does (int32).
        epochs: [CHANNELS] int32 on the device, zero at first.
    """

    rank: int
    size: int
    table: Tensor
    epochs: Tensor


def slots_bytes(size: int) -> int:
    """Returns the bytes of one rank's slots: of 2 phases, 2 epochs, each source and each channel."""
    return 2 * 2 * size * CHANNELS * SLOT_WORDS * 8


def can_sum(x: Tensor) -> bool:
    """Whether the kernels sum tensors of x's dtype, layout and size: contiguous, of whole words."""
    return x.dtype in _ELEMENTS and x.is_contiguous() and x.nbytes % 4 == 0 and x.data_ptr() % 4 == 0


@triton.jit
def _first(words, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The element in the low half of each word, or the only one, as float32."""
    if ELEMENT == tl.float32:
        value = words.to(tl.float32, bitcast=True)
    else:
        value = (words & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _second(words, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The element in the high half of each word, as float32; zero where a word is one element."""
    if ELEMENT == tl.float32:
        value = tl.zeros_like(words).to(tl.float32)
    else:
        value = (words >> 16).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _joined(first, second, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of two elements each, rounded from float32; of the first alone where it fills the word."""
    if ELEMENT == tl.float32:
        words = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = low | (second.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


@triton.jit
def _slot(phase, epoch, source, channel, SIZE: tl.constexpr, NUM_CHANNELS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a slot starts, in words of 8 bytes."""
    return (((phase * 2 + (epoch & 1)) * SIZE + source) * NUM_CHANNELS + channel) * WIDTH


@triton.jit
def _push(table_ptr, slot, words, mask, epoch, SIZE: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes row r of ``words`` [RANKS, WIDTH], or its only row, into the slot of rank r."""
    ranks = tl.arange(0, RANKS)
    bases = tl.multiple_of(tl.load(table_ptr + ranks, ranks < SIZE, other=0), 16)
    pointers = bases[:, None].to(tl.pointer_type(tl.int64)) + slot + tl.arange(0, WIDTH)[None, :]
    marked = (epoch.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    tl.store(pointers, tl.broadcast_to(marked, (RANKS, WIDTH)), mask & (ranks < SIZE)[:, None])


@triton.jit
def _await(  # type: ignore[no-untyped-def]
    table_ptr, rank, slots, mask, epoch, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Returns the words [RANKS, WIDTH] of an epoch from this rank's slots (one per source) once all have come."""
    base = tl.multiple_of(tl.load(table_ptr + rank), 16).to(tl.pointer_type(tl.int64))
    abort_ptr = tl.load(table_ptr + SIZE).to(tl.pointer_type(tl.int32))
    pointers = base + slots[:, None] + tl.arange(0, WIDTH)[None, :]
    marked = tl.load(pointers, mask, other=0, volatile=True)
    missing = tl.max(tl.where(mask & ((marked >> 32).to(tl.int32) != epoch), 1, 0))
    spins = 0
    aborted = 0
    while missing != 0:
        spins += 1
        if spins % _SPINS_PER_LOOK == 0:
            aborted = tl.load(abort_ptr, volatile=True)
        marked = tl.load(pointers, mask, other=0, volatile=True)
        # One maximum over all threads: they leave together, although each may see the abort word change by itself.
        missing = tl.max(tl.where(mask & ((marked >> 32).to(tl.int32) != epoch) & (aborted == 0), 1, 0))
    return marked.to(tl.int32)


@triton.jit
def _total(words, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums words [RANKS, WIDTH] of elements over the ranks, rounded to them."""
    first = tl.sum(_first(words, ELEMENT), axis=0)
    return _joined(first, tl.sum(_second(words, ELEMENT), axis=0), ELEMENT)


@triton.jit
def _sum_words(  # type: ignore[no-untyped-def]
    table_ptr,
    words,
    mask,
    epoch,
    rank,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Returns the sum [BLOCK] of the ranks' words [BLOCK]: each sends all of its words to all."""
    channel = tl.program_id(0)
    sources = tl.arange(0, RANKS)
    own = _slot(0, epoch, rank, channel, SIZE, NUM_CHANNELS, WIDTH)
    _push(table_ptr, own, words[None, :], mask[None, :], epoch, SIZE, RANKS, BLOCK)
    slots = _slot(0, epoch, sources, channel, SIZE, NUM_CHANNELS, WIDTH)
    received = _await(table_ptr, rank, slots, mask[None, :] & (sources < SIZE)[:, None], epoch, SIZE, BLOCK)
    return _total(received, ELEMENT)


@triton.jit(do_not_specialize=["rank"])
def _one_shot_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    table_ptr: tl.tensor,
    epochs_ptr: tl.tensor,
    num_words: tl.tensor,
    rank: tl.tensor,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """BLOCK words at a time; every rank sums all of them."""
    channel = tl.program_id(0)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs_ptr + channel)
    for start in range(channel * BLOCK, num_words, tl.num_programs(0) * BLOCK):
        epoch += 1
        at = start + tl.arange(0, BLOCK)
        mask = at < num_words
        words = tl.load(x_ptr + at, mask, other=0)
        total = _sum_words(
            table_ptr, words, mask, epoch, rank, SIZE, RANKS, BLOCK, ELEMENT, NUM_CHANNELS, WIDTH
        )  # fmt: skip
        tl.store(out_ptr + at, total, mask)
    tl.store(epochs_ptr + channel, epoch)


@triton.jit(do_not_specialize=["rank"])
def _two_shot_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    table_ptr: tl.tensor,
    epochs_ptr: tl.tensor,
    num_words: tl.tensor,
    rank: tl.tensor,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """SIZE x BLOCK words at a time; rank r sums the r-th BLOCK and sends it to all."""
    channel = tl.program_id(0)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs_ptr + channel)
    ranks = tl.arange(0, RANKS)
    cols = tl.arange(0, BLOCK)
    is_rank = (ranks < SIZE)[:, None]
    for start in range(channel * SIZE * BLOCK, num_words, tl.num_programs(0) * SIZE * BLOCK):
        epoch += 1
        at = start + ranks[:, None] * BLOCK + cols[None, :]
        mask = is_rank & (at < num_words)
        words = tl.load(x_ptr + at, mask, other=0)
        own = _slot(0, epoch, rank, channel, SIZE, NUM_CHANNELS, WIDTH)
        _push(table_ptr, own, words, mask, epoch, SIZE, RANKS, BLOCK)
        is_mine = (start + rank * BLOCK + cols < num_words)[None, :]
        slots = _slot(0, epoch, ranks, channel, SIZE, NUM_CHANNELS, WIDTH)
        received = _await(table_ptr, rank, slots, is_rank & is_mine, epoch, SIZE, BLOCK)
        total = _total(received, ELEMENT)
        own = _slot(1, epoch, rank, channel, SIZE, NUM_CHANNELS, WIDTH)
        _push(table_ptr, own, total[None, :], is_mine, epoch, SIZE, RANKS, BLOCK)
        slots = _slot(1, epoch, ranks, channel, SIZE, NUM_CHANNELS, WIDTH)
        tl.store(out_ptr + at, _await(table_ptr, rank, slots, mask, epoch, SIZE, BLOCK), mask)
    tl.store(epochs_ptr + channel, epoch)


@triton.jit(do_not_specialize=["num_rows", "rank"])
def _sum_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    epochs_ptr: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    rank: tl.tensor,
    H: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """A row of H elements at a time: its sum over the ranks, the residual's addition and the norm of `rms_norm`."""
    channel = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < ROW_WORDS
    weight = tl.load(weight_ptr + cols, mask, other=0)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs_ptr + channel)
    for row in range(channel, num_rows, tl.num_programs(0)):
        epoch += 1
        start = row * ROW_WORDS
        words = tl.load(x_ptr + start + cols, mask, other=0)
        residual = tl.load(residual_ptr + start + cols, mask, other=0)
        words = _sum_words(
            table_ptr, words, mask, epoch, rank, SIZE, RANKS, BLOCK, ELEMENT, NUM_CHANNELS, WIDTH
        )  # fmt: skip
        first = _first(words, ELEMENT) + _first(residual, ELEMENT)
        words = _joined(first, _second(words, ELEMENT) + _second(residual, ELEMENT), ELEMENT)
        tl.store(total_ptr + start + cols, words, mask)
        first, second = _first(words, ELEMENT), _second(words, ELEMENT)
        factor = tl.rsqrt(tl.sum(first * first + second * second, axis=0) / H + eps)
        first, second = first * factor, second * factor
        if UNIT_OFFSET:
            first *= _first(weight, ELEMENT) + 1.0
            second *= _second(weight, ELEMENT) + 1.0
        else:
            rounded = _joined(first, second, ELEMENT)
            first = _first(rounded, ELEMENT) * _first(weight, ELEMENT)
            second = _second(rounded, ELEMENT) * _second(weight, ELEMENT)
        words = _joined(first, second, ELEMENT)
        if QUANTIZE:
            scale = tl.load(out_scale_ptr).to(tl.float32)
            low = to_float8(tl.div_rn(_first(words, ELEMENT), scale), NATIVE_FLOAT8).to(tl.uint8, bitcast=True)
            high = to_float8(tl.div_rn(_second(words, ELEMENT), scale), NATIVE_FLOAT8).to(tl.uint8, bitcast=True)
            tl.store(out_ptr + start + cols, (low.to(tl.uint16) | (high.to(tl.uint16) << 8)).to(tl.int16), mask)
        else:
            tl.store(out_ptr + start + cols, words, mask)
    tl.store(epochs_ptr + channel, epoch)


def one_shot(x: Tensor, peers: Peers) -> Tensor:
    """Returns the sum of the ranks' x (see `can_sum`) in one exchange; every rank reads all of every x."""
    ranks = next_power_of_2(peers.size)
    block = _block(x.nbytes // 4, min(SLOT_WORDS, _MOST_WORDS // ranks))
    return _launch(_one_shot_kernel, x, peers, block, block)


def two_shot(x: Tensor, peers: Peers) -> Tensor:
    """Returns the sum of the ranks' x in two exchanges, each of 1/size of what `one_shot` moves.

    Where `one_shot` and this sum the same, bits are equal too.
    """
    ranks = next_power_of_2(peers.size)
    block = _block(-(-x.nbytes // (4 * peers.size)), min(SLOT_WORDS, _MOST_WORDS // ranks))
    return _launch(_two_shot_kernel, x, peers, block, block * peers.size)


def can_sum_and_norm(x: Tensor, weight: Tensor, peers: Peers) -> bool:
    """Whether `sum_and_norm` takes x [T, H]: rows of whole words that fit into a program's registers."""
    words = x.shape[-1] * x.element_size() // 4
    fits = next_power_of_2(words) * next_power_of_2(peers.size) <= _MOST_WORDS
    return can_sum(x) and x.shape[-1] % 2 == 0 and weight.dtype is x.dtype and fits and words <= SLOT_WORDS


def sum_and_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    peers: Peers,
    out_scale: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns ``rms_norm(sum of the ranks' x, weight, eps, residual, out_scale, unit_offset)`` from one kernel.

    Args:
        x: [T, H], contiguous, this rank's summand.
        residual: [T, H] of x's dtype, contiguous, the same on all ranks.
        weight: [H] of x's dtype, contiguous.
        eps: added to the mean square.
        peers: the ranks.
        out_scale: [] float32; if given the normed rows come as float8_e4m3fn, divided by it; 16-bit x only.
        unit_offset: multiply by 1 + weight.

    Returns:
        The normed rows and what was normed, both [T, H].
    """
    out = torch.empty(x.shape, dtype=x.dtype if out_scale is None else torch.float8_e4m3fn, device=x.device)
    total = torch.empty_like(x)
    num_rows, width = x.shape
    if num_rows == 0:
        return out, total
    words, ranks = width * x.element_size() // 4, next_power_of_2(peers.size)
    block = next_power_of_2(words)
    _sum_norm_kernel[(min(num_rows, CHANNELS),)](
        x.view(torch.int32),
        residual.view(torch.int32),
        weight.view(torch.int32),
        out.view(torch.int32 if out_scale is None else torch.int16),
        total.view(torch.int32),
        out_scale,
        peers.table,
        peers.epochs,
        num_rows,
        eps,
        peers.rank,
        H=width,
        ROW_WORDS=words,
        SIZE=peers.size,
        RANKS=ranks,
        BLOCK=block,
        ELEMENT=_ELEMENTS[x.dtype],
        NUM_CHANNELS=CHANNELS,
        WIDTH=SLOT_WORDS,
        UNIT_OFFSET=unit_offset,
        QUANTIZE=out_scale is not None,
        NATIVE_FLOAT8=has_float8(),
        USE_PDL=use_pdl(),
        num_warps=_num_warps(block * ranks),
        **launch_options(),
    )
    return out, total


def _block(words: int, most: int) -> int:
    """Returns a program's words at a time: as few as keep every channel busy."""
    return min(most, max(_LEAST_BLOCK, next_power_of_2(-(-words // CHANNELS))))


def _num_warps(words: int) -> int:
    return min(16, max(2, words // _WORDS_PER_WARP))


def _launch(kernel: object, x: Tensor, peers: Peers, block: int, tile: int) -> Tensor:
    """Returns the sum of x, ``tile`` words at a time in each program."""
    out = torch.empty_like(x)
    num_words, ranks = x.nbytes // 4, next_power_of_2(peers.size)
    if num_words == 0:
        return out
    kernel[(min(CHANNELS, -(-num_words // tile)),)](  # type: ignore[index]
        x.view(-1).view(torch.int32),
        out.view(-1).view(torch.int32),
        peers.table,
        peers.epochs,
        num_words,
        peers.rank,
        SIZE=peers.size,
        RANKS=ranks,
        BLOCK=block,
        ELEMENT=_ELEMENTS[x.dtype],
        NUM_CHANNELS=CHANNELS,
        WIDTH=SLOT_WORDS,
        USE_PDL=use_pdl(),
        num_warps=_num_warps(block * ranks),
        **launch_options(),
    )
    return out
