"""Sums over GPUs in one or two exchanges of `lamella_core.kernels.triton.exchange`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.exchange import (
    ELEMENTS,
    Peers,
    await_words,
    num_warps,
    push,
    slot_of,
    sum_words,
    total_of,
    words_at_a_time,
)
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl


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
        total = sum_words(
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
        own = slot_of(0, epoch, rank, channel, SIZE, NUM_CHANNELS, WIDTH)
        push(table_ptr, own, words, mask, epoch, SIZE, RANKS, BLOCK)
        is_mine = (start + rank * BLOCK + cols < num_words)[None, :]
        slots = slot_of(0, epoch, ranks, channel, SIZE, NUM_CHANNELS, WIDTH)
        received = await_words(table_ptr, rank, slots, is_rank & is_mine, epoch, SIZE, BLOCK)
        total = total_of(received, ELEMENT)
        own = slot_of(1, epoch, rank, channel, SIZE, NUM_CHANNELS, WIDTH)
        push(table_ptr, own, total[None, :], is_mine, epoch, SIZE, RANKS, BLOCK)
        slots = slot_of(1, epoch, ranks, channel, SIZE, NUM_CHANNELS, WIDTH)
        tl.store(out_ptr + at, await_words(table_ptr, rank, slots, mask, epoch, SIZE, BLOCK), mask)
    tl.store(epochs_ptr + channel, epoch)


def one_shot(x: Tensor, peers: Peers) -> Tensor:
    """Returns the sum of the ranks' x (see `can_sum`) in one exchange; every rank reads all of every x."""
    block = words_at_a_time(x.nbytes // 4, peers)
    return _launch(_one_shot_kernel, x, peers, block, block)


def two_shot(x: Tensor, peers: Peers) -> Tensor:
    """Returns the sum of the ranks' x in two exchanges, each of 1/size of what `one_shot` moves.

    Where `one_shot` and this sum the same, bits are equal too.
    """
    block = words_at_a_time(-(-x.nbytes // (4 * peers.size)), peers)
    return _launch(_two_shot_kernel, x, peers, block, block * peers.size)


def _launch(kernel: Any, x: Tensor, peers: Peers, block: int, tile: int) -> Tensor:
    """Returns the sum of x, ``tile`` words at a time in each program."""
    out = torch.empty_like(x)
    num_words, ranks = x.nbytes // 4, next_power_of_2(peers.size)
    if num_words == 0:
        return out
    kernel[(min(peers.num_channels, -(-num_words // tile)),)](
        x.view(-1).view(torch.int32),
        out.view(-1).view(torch.int32),
        peers.table,
        peers.epochs,
        num_words,
        peers.rank,
        SIZE=peers.size,
        RANKS=ranks,
        BLOCK=block,
        ELEMENT=ELEMENTS[x.dtype],
        NUM_CHANNELS=peers.num_channels,
        WIDTH=peers.slot_words,
        USE_PDL=use_pdl(),
        num_warps=num_warps(block * ranks),
        **launch_options(),
    )
    return out
