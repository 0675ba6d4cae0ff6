"""One rank of a test of the kernels that sum and gather over ranks, in triton's interpreter and a process of its own.

    TRITON_INTERPRET=1 python -m tests.support.all_reduce_rank RANK SIZE FOLDER

maps the slots of all ranks from files in FOLDER and writes its results there.
"""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.support.triton_interpreter import repair_interpreter

from lamella_core.kernels.triton import all_gather, all_reduce
from lamella_core.kernels.triton.all_reduce_norm import sum_and_norm
from lamella_core.kernels.triton.exchange import Peers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WORDS = (2, 600)  # of one message; the last takes every channel several tiles
FEWER = {3: ("bfloat16",)}  # by number of ranks: more processes than cores poll slowly
ROUNDS = 3  # of the same shape: both of a channel's slots, and one of them again
H, EPS = 24, 1e-5
GATHERED = {"rows": (3, 86), "planes": (2, 3, 6)}  # shapes; the first takes every channel several blocks
CHANNELS, SLOT_WORDS = 2, 128


def dtypes(size: int) -> tuple[str, ...]:
    return FEWER.get(size, tuple(DTYPES))


def summand(rank: int, name: str, words: int, round_: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * words + round_)
    dtype = DTYPES[name]
    return torch.randn(words * 4 // dtype.itemsize, generator=generator).to(dtype)


def part(rank: int, name: str, round_: int) -> torch.Tensor:
    """What a rank adds to a gather: integers of another width each round."""
    dtype = (torch.bfloat16, torch.float32, torch.int64)[round_ % 3]
    shape = GATHERED[name]
    return (torch.arange(math.prod(shape)).view(shape) % 100 + 100 * rank).to(dtype)


def norm_inputs(rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x of a rank, residual and weight of all."""
    own, common = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(99)
    dtype = DTYPES[name]
    residual, weight = torch.randn(3, H, generator=common), torch.randn(H, generator=common)
    return torch.randn(3, H, generator=own).to(dtype), residual.to(dtype), weight.to(dtype)


def map_peers(rank: int, size: int, folder: Path) -> tuple[Peers, list[torch.Tensor]]:
    """Returns the peers, and the tensors that own their memory; the last is the abort word, this rank's own."""
    count = Peers.slots_bytes(size) // 8  # more than the few channels need
    slots = [torch.from_file(str(folder / f"slots{r}"), True, count, dtype=torch.int64) for r in range(size)]
    abort = torch.zeros(1, dtype=torch.int32)
    table = torch.tensor([x.data_ptr() for x in (*slots, abort)])
    epochs = torch.zeros(CHANNELS, dtype=torch.int32)
    return Peers(rank, size, table, epochs, CHANNELS, SLOT_WORDS), [*slots, abort]


def results(peers: Peers) -> dict[str, torch.Tensor]:
    found = {}
    for name in dtypes(peers.size):
        for words in WORDS:
            for round_ in range(ROUNDS):
                x = summand(peers.rank, name, words, round_)
                found[f"one {name} {words} {round_}"] = all_reduce.one_shot(x, peers)
                found[f"two {name} {words} {round_}"] = all_reduce.two_shot(x, peers)
        x, residual, weight = norm_inputs(peers.rank, name)
        for unit_offset in (False, True):
            got = sum_and_norm(x, residual, weight, EPS, peers, unit_offset=unit_offset)
            found[f"normed {name} {unit_offset}"], found[f"total {name} {unit_offset}"] = got
        if x.element_size() == 2:
            scale = torch.tensor(0.05)
            found[f"float8 {name}"] = sum_and_norm(x, residual, weight, EPS, peers, scale)[0].float()
    for name, shape in GATHERED.items():
        for dim in range(len(shape)):
            for round_ in range(ROUNDS):
                x = part(peers.rank, name, round_)
                assert all_gather.can_gather(x, dim)
                found[f"gather {name} {dim} {round_}"] = all_gather.gather(x, dim, peers)
    return found


def aborted(peers: Peers, abort: torch.Tensor) -> None:
    """Rank 0 waits for a rank that does not come, until its abort word is set."""
    threading.Timer(0.5, lambda: abort.fill_(1)).start()
    all_reduce.one_shot(torch.ones(2), peers)
    all_reduce.two_shot(torch.ones(2), peers)
    all_gather.gather(torch.ones(2), 0, peers)


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    repair_interpreter()
    peers, owners = map_peers(rank, size, folder)
    found = results(peers)
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"results{rank}")
    if rank == 0:
        aborted(peers, owners[-1])


if __name__ == "__main__":
    main()
