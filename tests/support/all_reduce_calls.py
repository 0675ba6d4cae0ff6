"""One call of each kernel that exchanges words between ranks, in each of its variants, for `triton_compiler`."""

from __future__ import annotations

import torch

from lamella_core.kernels.triton import all_gather, all_reduce
from lamella_core.kernels.triton.all_reduce_norm import sum_and_norm
from lamella_core.kernels.triton.exchange import Peers

BF16 = torch.bfloat16


def calls() -> None:
    for size, dtypes in ((2, (BF16, torch.float32)), (3, (torch.float16,)), (8, (BF16,))):
        table = torch.zeros(size + 1, dtype=torch.int64)
        peers = Peers(1, size, table, torch.zeros(Peers.num_channels, dtype=torch.int32))
        for dtype in dtypes:
            x = torch.zeros(8, 4096, dtype=dtype)
            all_reduce.one_shot(x, peers)
            all_reduce.two_shot(x, peers)
        all_gather.gather(torch.zeros(8, 4096, dtype=BF16), 1, peers)
        all_gather.gather(torch.zeros(1, 2, dtype=BF16), 1, peers)
    peers = Peers(0, 4, torch.zeros(5, dtype=torch.int64), peers.epochs)
    for dtype in (BF16, torch.float32):
        x, weight, scale = torch.zeros(4, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype), torch.ones(())
        sum_and_norm(x, x, weight, 1e-5, peers)
        if dtype is BF16:
            sum_and_norm(x, x, weight, 1e-5, peers, unit_offset=True)
            sum_and_norm(x, x, weight, 1e-5, peers, scale)
