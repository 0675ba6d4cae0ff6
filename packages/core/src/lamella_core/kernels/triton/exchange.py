"""Sums and gathers over GPUs that write into each other's memory, for messages too small for NCCL to be quick with.

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

from lamella_core.kernels.triton.launch import next_power_of_2

_SPINS_PER_LOOK = tl.constexpr(256)  # polls between two looks at the abort word, which lies across PCIe
_WORDS_PER_WARP = 256
_LEAST_BLOCK = 256
MOST_WORDS = 16384  # of all ranks in one program's registers
ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Peers:
    """The ranks' slots as one rank sees them.

    Attributes:
        rank: index of this one.
        size: number of ranks.
        table: [size + 1] int64 on the device: where each rank's slots lie (`slots_bytes`, zero at first, at a multiple
            of 16), then where the abort word does (int32).
        epochs: [num_channels] int32 on the device, zero at first.
        num_channels: most programs of a launch; by default they all run at once, one to a multiprocessor.
        slot_words: most words of one rank that a program handles at a time.
    """

    rank: int
    size: int
    table: Tensor
    epochs: Tensor
    num_channels: int = 128
    slot_words: int = 4096

    @classmethod
    def slots_bytes(cls, size: int) -> int:
        """Returns the bytes of one rank's slots: of 2 phases, 2 epochs, each source and each channel."""
        return 2 * 2 * size * cls.num_channels * cls.slot_words * 8


def can_sum(x: Tensor) -> bool:
    """Whether the kernels sum tensors of x's dtype, layout and size: contiguous, of whole words."""
    return x.dtype in ELEMENTS and x.is_contiguous() and x.nbytes % 4 == 0 and x.data_ptr() % 4 == 0


def num_warps(words: int) -> int:
    """Returns the warps of a program that holds so many words of all ranks."""
    return min(16, max(2, words // _WORDS_PER_WARP))


def words_at_a_time(words: int, peers: Peers) -> int:
    """Returns a program's words of one rank at a time, of so many in all: as few as keep every channel busy."""
    most = min(peers.slot_words, MOST_WORDS // next_power_of_2(peers.size))
    return min(most, max(_LEAST_BLOCK, next_power_of_2(-(-words // peers.num_channels))))


@triton.jit
def first_elements(words, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The element in the low half of each word, or the only one, as float32."""
    if ELEMENT == tl.float32:
        value = words.to(tl.float32, bitcast=True)
    else:
        value = (words & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
    return value


@triton.jit
def second_elements(words, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The element in the high half of each word, as float32; zero where a word is one element."""
    if ELEMENT == tl.float32:
        value = tl.zeros_like(words).to(tl.float32)
    else:
        value = (words >> 16).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
    return value


@triton.jit
def join_elements(first, second, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of two elements each, rounded from float32; of the first alone where it fills the word."""
    if ELEMENT == tl.float32:
        words = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = low | (second.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


@triton.jit
def slot_of(phase, epoch, source, channel, SIZE: tl.constexpr, NUM_CHANNELS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a slot starts, in words of 8 bytes."""
    return (((phase * 2 + (epoch & 1)) * SIZE + source) * NUM_CHANNELS + channel) * WIDTH


@triton.jit
def push(table_ptr, slot, words, mask, epoch, SIZE: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes row r of ``words`` [RANKS, WIDTH], or its only row, into the slot of rank r."""
    ranks = tl.arange(0, RANKS)
    bases = tl.multiple_of(tl.load(table_ptr + ranks, ranks < SIZE, other=0), 16)
    pointers = bases[:, None].to(tl.pointer_type(tl.int64)) + slot + tl.arange(0, WIDTH)[None, :]
    marked = (epoch.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    tl.store(pointers, tl.broadcast_to(marked, (RANKS, WIDTH)), mask & (ranks < SIZE)[:, None])


@triton.jit
def await_words(  # type: ignore[no-untyped-def]
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
def total_of(words, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums words [RANKS, WIDTH] of elements over the ranks, rounded to them."""
    first = tl.sum(first_elements(words, ELEMENT), axis=0)
    return join_elements(first, tl.sum(second_elements(words, ELEMENT), axis=0), ELEMENT)


@triton.jit
def sum_words(  # type: ignore[no-untyped-def]
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
    own = slot_of(0, epoch, rank, channel, SIZE, NUM_CHANNELS, WIDTH)
    push(table_ptr, own, words[None, :], mask[None, :], epoch, SIZE, RANKS, BLOCK)
    slots = slot_of(0, epoch, sources, channel, SIZE, NUM_CHANNELS, WIDTH)
    received = await_words(table_ptr, rank, slots, mask[None, :] & (sources < SIZE)[:, None], epoch, SIZE, BLOCK)
    return total_of(received, ELEMENT)
