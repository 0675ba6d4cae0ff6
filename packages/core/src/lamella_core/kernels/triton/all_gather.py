"""Gathers over GPUs in one exchange of `lamella_core.kernels.triton.exchange`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.exchange import Peers, await_words, num_warps, push, slot_of, words_at_a_time
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl

_MOST_BYTES = 1 << 28  # of one rank's x: places in what is gathered are 32-bit integers


@triton.jit(do_not_specialize=["rank"])
def _gather_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    table_ptr: tl.tensor,
    epochs_ptr: tl.tensor,
    num_words: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """BLOCK words of every rank at a time; x has rows of ``width`` words, out the ranks' rows side by side."""
    channel = tl.program_id(0)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs_ptr + channel)
    ranks = tl.arange(0, RANKS)
    is_other = ((ranks < SIZE) & (ranks != rank))[:, None]
    is_rank = (ranks < SIZE)[:, None]
    for start in range(channel * BLOCK, num_words, tl.num_programs(0) * BLOCK):
        epoch += 1
        at = start + tl.arange(0, BLOCK)
        mask = (at < num_words)[None, :]
        words = tl.load(x_ptr + at, at < num_words, other=0)[None, :]
        own = slot_of(0, epoch, rank, channel, SIZE, NUM_CHANNELS, WIDTH)
        push(table_ptr, own, words, mask & is_other, epoch, SIZE, RANKS, BLOCK)
        slots = slot_of(0, epoch, ranks, channel, SIZE, NUM_CHANNELS, WIDTH)
        received = await_words(table_ptr, rank, slots, mask & is_other, epoch, SIZE, BLOCK)
        rows, cols = at // width, at % width
        places = (rows * SIZE * width + cols)[None, :] + ranks[:, None] * width
        tl.store(out_ptr + places, tl.where(is_other, received, words), mask & is_rank)
    tl.store(epochs_ptr + channel, epoch)


def can_gather(x: Tensor, dim: int) -> bool:
    """Whether `gather` takes x: contiguous, and what a rank adds to ``dim``, 0 <= dim < x.dim(), is of whole words."""
    row_bytes = math.prod(x.shape[dim:]) * x.element_size()
    return x.is_contiguous() and row_bytes % 4 == 0 and x.data_ptr() % 4 == 0 and x.nbytes <= _MOST_BYTES


def gather(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """Returns the ranks' x (see `can_gather`) side by side along ``dim``, 0 <= dim < x.dim().

    No rank reads another's x before it has launched its own part, and nothing is rounded.
    """
    shape = list(x.shape)
    shape[dim] *= peers.size
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    num_words, ranks = x.nbytes // 4, next_power_of_2(peers.size)
    if num_words == 0:
        return out
    block = words_at_a_time(num_words, peers)
    _gather_kernel[(min(peers.num_channels, -(-num_words // block)),)](
        x.view(-1).view(torch.int32),
        out.view(-1).view(torch.int32),
        peers.table,
        peers.epochs,
        num_words,
        math.prod(x.shape[dim:]) * x.element_size() // 4,
        peers.rank,
        SIZE=peers.size,
        RANKS=ranks,
        BLOCK=block,
        NUM_CHANNELS=peers.num_channels,
        WIDTH=peers.slot_words,
        USE_PDL=use_pdl(),
        num_warps=num_warps(block * ranks),
        **launch_options(),
    )
    return out
